"""A starter for a task of the user's own, from a look at the table.

python -m commands.new_task films reviews.csv --title "Squid Game"
(what `make new-task NAME=films SOURCE=reviews.csv TITLE="Squid Game"` calls)
"""

import argparse

from core.errors import run
from data_prep.new_task import new_task


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m commands.new_task", description=__doc__.partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("source")
    parser.add_argument("--title", default="")
    options = parser.parse_args(words)
    new_task(options.name, options.source, options.title)


if __name__ == "__main__":
    run(main)
