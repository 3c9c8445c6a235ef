"""Fine-tuning: a base model and JSONL become `runs/<task>/<run>/<task>.nemo`."""
