"""From rows that stand to split files: each row is put into the task's words, hashed and counted as it is written."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_prep.prompt import Prompt
from data_prep.row_store import Entry

COUNTED_ROWS = 20_000  # of each split, for the token counts: enough for a mean, and done in seconds

_to_json = json.JSONEncoder(ensure_ascii=False).encode
RowFields = Callable[[Mapping[str, str], Prompt], Mapping[str, str]]


def row_fields_of(task: str) -> RowFields:
    """How a row's columns become the prompt's fields: `row_fields` of `data_prep/<task>.py`, else as they are."""
    if task.isidentifier() and find_spec(f"data_prep.{task}"):
        return getattr(import_module(f"data_prep.{task}"), "row_fields", _columns_as_they_are)
    return _columns_as_they_are


def _columns_as_they_are(fields: Mapping[str, str], prompt: Prompt) -> Mapping[str, str]:
    return fields


class SplitWriter:
    """Writes rows as JSON Lines.

    Args:
        columns: the names of an entry's cells.
        tokenizer_file: counts tokens where it is given.
    """

    def __init__(self, task: str, columns: Iterable[str], prompt: Prompt, tokenizer_file: Path | None) -> None:
        self._columns, self._prompt, self._row_fields = list(columns), prompt, row_fields_of(task)
        self._tokenizer: Any = None
        if tokenizer_file:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def write(self, path: Path, batches: Iterable[list[Entry]], fields: Iterable[str]) -> dict[str, Any]:
        """Write a split, each row from the columns `fields` alone.

        Returns:
            Its part of the manifest: rows, bytes, sha256 and, with a tokenizer, tokens.
        """
        kept = set(fields)
        digest, rows, size, lengths = hashlib.sha256(), 0, 0, list[int]()
        with path.open("wb") as file:
            for batch in batches:
                written = [self._row(entry, kept) for entry in batch]
                lines = "".join(_to_json(row) + "\n" for row in written).encode()
                file.write(lines)
                digest.update(lines)
                size += len(lines)
                rows += len(written)
                if self._tokenizer and len(lengths) < COUNTED_ROWS:
                    lengths += self._count(written[: COUNTED_ROWS - len(lengths)])
        split: dict[str, Any] = {"rows": rows, "bytes": size, "sha256": digest.hexdigest()}
        if self._tokenizer:
            mean = round(sum(lengths) / max(len(lengths), 1), 1)
            split["tokens"] = {"total": sum(lengths), "mean": mean, "max": max(lengths, default=0)}
            split["tokens"]["counted_rows"] = len(lengths)
        return split

    def _row(self, entry: Entry, kept: set[str]) -> dict[str, Any]:
        cells = {name: cell if name in kept else "" for name, cell in zip(self._columns, entry.cells, strict=True)}
        # A column without text stays empty: the prompt's own context is for asking, not for rows that have none.
        values = self._row_fields(cells, self._prompt)
        wanted = {"input": self._prompt.write_instruction(**values), "output": self._prompt.write_response(**values)}
        return {**wanted, "row": entry.row, **cells, **wanted}  # a column may be called input or output too

    def _count(self, rows: list[dict[str, Any]]) -> list[int]:
        texts = [self._prompt.wrap(row["input"]) + row["output"] for row in rows]
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(texts)]
