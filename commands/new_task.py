"""A starter for a task of the user's own, from a look at the table.

python -m commands.new_task name=films source=reviews.csv title="Squid Game"
(what `make new-task NAME=films SOURCE=reviews.csv TITLE="Squid Game"` calls; PREVIEW=1 is preview=true)
"""

from pydantic import Field

from core.arguments import Arguments, parse
from core.errors import run
from data_prep.new_task import new_task


class Options(Arguments):
    name: str = Field(description="of the task, such as films: letters, digits and _")
    source: str = Field(description="its table: a CSV, TSV, JSONL or Parquet file, or hf:OWNER/NAME")
    title: str = Field("", description="what the reviews are of, where the table holds reviews")
    asked: str = Field("", description="the column that the model is given, where the headers do not say it")
    answer: str = Field("", description="the column that it learns to answer with")
    preview: bool = Field(False, description="show three rows as the model would read them, and write nothing")


def main(argv: list[str]) -> None:
    options = parse(Options, argv)
    new_task(options.name, options.source, options.title, options.asked, options.answer, options.preview)


if __name__ == "__main__":
    run(main)
