"""Turn a table into training data, and show some of its rows.

    python -m commands.data task=slang [task.data.source=FILE] [examples=5]

The folder's counts and some of its rows are shown, also where it is up to date.
"""

from core.configuration import load_config
from core.errors import UserError, run
from data_prep.prepare import prepare
from data_prep.show_rows import EXAMPLES


def main(words: list[str]) -> None:
    asked = [word.partition("=")[2] for word in words if word.startswith("examples=")]
    if asked and not asked[-1].isdecimal():
        raise UserError(f"examples={asked[-1]} is not a number of rows, such as examples=5")
    config = load_config([word for word in words if not word.startswith("examples=")])
    from core.base_model import ensure_base_model

    prepare(config, ensure_base_model(config.model) / "tokenizer.json", int(asked[-1]) if asked else EXAMPLES)


run(main)
