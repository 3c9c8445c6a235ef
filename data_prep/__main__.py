"""`python -m data_prep task=slang [task.data.source=FILE] [examples=5]`: a table becomes training data (`prepare.py`).

The folder's counts and some of its rows are shown, also where it is up to date.
"""

from data_prep.prepare import prepare
from data_prep.show_rows import EXAMPLES
from nemo_configs.command_line import UserError, load_config, run


def main(words: list[str]) -> None:
    asked = [word.partition("=")[2] for word in words if word.startswith("examples=")]
    if asked and not asked[-1].isdecimal():
        raise UserError(f"examples={asked[-1]} is not a number of rows, such as examples=5")
    config = load_config([word for word in words if not word.startswith("examples=")])
    from training.base_model import ensure_base_model

    prepare(config, ensure_base_model(config.model) / "tokenizer.json", int(asked[-1]) if asked else EXAMPLES)


run(main)
