"""`python -m data_prep task=slang [task.data.source=FILE]`: a table of rows becomes training data, see `prepare.py`."""

from data_prep.prepare import prepare
from nemo_configs.command_line import load_config, run


def main(words: list[str]) -> None:
    config = load_config(words)
    from training.base_model import ensure_base_model

    prepare(config, ensure_base_model(config.model) / "tokenizer.json")


run(main)
