"""A starter for a task of the user's own, from a look at the table.

python -m commands.new_task name=films source=reviews.csv title="Squid Game"
(what `make new-task NAME=films SOURCE=reviews.csv TITLE="Squid Game"` calls)
"""

from pydantic import Field

from core.arguments import Arguments, parse
from core.errors import run
from data_prep.new_task import new_task


class Options(Arguments):
    name: str = Field(description="of the task, such as films: letters, digits and _")
    source: str = Field(description="its table: a CSV, TSV, JSONL or Parquet file, or hf:OWNER/NAME")
    title: str = Field("", description="what the reviews are of, where the table holds reviews")


def main(argv: list[str]) -> None:
    options = parse(Options, argv)
    new_task(options.name, options.source, options.title)


if __name__ == "__main__":
    run(main)
