"""One OmegaConf tree: task × model × peft × trainer, and an optional experiment on top."""
