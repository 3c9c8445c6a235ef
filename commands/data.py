"""Turn a table into training data, and show some of its rows.

    python -m commands.data task=slang [task.data.source=FILE] [examples=5]

The folder's counts and some of its rows are shown, also where it is up to date.
"""

from pydantic import Field

from core.arguments import Arguments
from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import run
from data_prep.prepare import prepare
from data_prep.show_rows import EXAMPLES


class Options(Arguments):
    examples: int = Field(EXAMPLES, ge=0, description="rows to show")


def main(argv: list[str]) -> None:
    config, options = load_config(argv, Options)
    tokenizer_file = ensure_base_model(config.model) / "tokenizer.json"
    prepare(config, tokenizer_file, options.examples)


if __name__ == "__main__":
    run(main)
