"""Fetch or build a base model, and nothing else.

python -m commands.base model=gemma-2-2b
"""

from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import run


def main(words: list[str]) -> None:
    print(ensure_base_model(load_config(words).model))


if __name__ == "__main__":
    run(main)
