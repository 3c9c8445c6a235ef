"""Plain text for continued training: a row is a text, which is learned from its first token to its last.

A text is a cell of a table, or a passage of a file of plain text (data_prep/read_passages.py). The rows that it becomes
are `{"text": …, "row": n}`. One of more than `task.train.max_length` tokens is cut where it is tokenized
(training/batches.py), so that the prepared data is the same for every length.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from data_prep.read_cells import CellReader
from data_prep.task import Task

PLAIN_TEXT = "text"  # the field that files of plain text are read into
BEGINNING = 60  # characters of a text that its key shows


class Reader(CellReader):
    """Turns a row's raw cells into `(key, cleaned cells, how many were repaired)`; the key of a text is short.

    Raises:
        UserError: the task has options that mean nothing for plain text.
    """

    def __init__(self, task: Task, tokenizer_file: Path | None) -> None:
        super().__init__(task)
        if not task.prompt.continues_text:
            raise UserError(
                "task.prompt: a plain text is learned as it is, so instruction and response are both '{text}' and the "
                "template is '{instruction}{response}'. For questions with answers, make a task without module: text"
            )
        if list(task.data.columns) != [PLAIN_TEXT]:
            others = ", ".join(name for name in task.data.columns if name != PLAIN_TEXT)
            raise UserError(
                f"task.data.columns: of plain text only the field {PLAIN_TEXT} is learned; leave out {others}"
            )
        for option in ("train_fields", "max_tokens"):
            if getattr(task.data, option) is not None:
                raise UserError(f"task.data.{option} means nothing for plain text, which is one field; leave it out")

    def __call__(self, raw: Sequence[str]) -> tuple[str, list[str], int]:
        key, cells, repaired = super().__call__(raw)
        if len(key) > BEGINNING:
            key = f"{key[:BEGINNING]} {hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
        return key, cells, repaired


ROW_BY_ROW = True


def split_rows(rows: Iterable[Mapping[str, Any]], split: str, task: Task) -> Iterator[dict[str, Any]]:
    """The rows of a split: the texts."""
    for row in rows:
        yield {PLAIN_TEXT: row[PLAIN_TEXT], "row": row["row"]}
