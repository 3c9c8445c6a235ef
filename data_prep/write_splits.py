"""Writes the split files: rows are worded by the task's prompt, hashed and counted as they are written."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from core.artifacts import Split, TokenCounts
from core.tasks import part_of
from data_prep.row_store import BATCH, StoredRow
from data_prep.task import Task

COUNTED_ROWS = 20_000  # of each split, for the token counts: enough for a mean, and done in seconds
COUNTED_BATCH = 512

_to_json = json.JSONEncoder(ensure_ascii=False).encode


class SplitWriter:
    """Writes rows as JSON Lines.

    `task.data.module` may name a folder of tasks/ for work that columns alone cannot express. Its `rows.py` has one of

        row_fields(columns, prompt) -> dict       the prompt's fields of a row, made from its columns
        split_rows(rows, split, task) -> rows     all rows of a split, made from all source rows of that split. Where
                                                  each is made from one source row alone, `ROW_BY_ROW = True` lets
                                                  several processes make parts of a split
        make_rows(sources, task, folder) -> dict  the rows of each split, made from the source rows of each; files of
                                                  the module's own may be written into `folder`

    and, if cells are more than one line of text each, a `Reader` (see tasks/chat/rows.py). It may also have

        finish(folder, splits) -> names           files of the module's own, written into `folder` when all else lies
                                                  there, that each run keeps a copy of

    Source rows have the form `{"row": number in the source, <column>: cleaned text}`.

    Args:
        tokenizer_file: a tokenizer.json to count tokens with; None leaves the counts out.
    """

    def __init__(self, task: Task, tokenizer_file: Path | None) -> None:
        self._task, self._prompt = task, task.prompt
        self._module = part_of(task.data.module, "rows", "task.data.module") if task.data.module else None
        self._names, self._row_fields = list(task.data.columns), getattr(self._module, "row_fields", None)
        self._made: dict[str, Iterable[dict[str, Any]]] = {}
        self._tokenizer: Any = None
        if tokenizer_file:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def begin(self, folder: Path, sources: Mapping[str, tuple[Iterable[list[StoredRow]], Iterable[str]]]) -> bool:
        """Let the module make the rows of all splits from the `(batches, fields)` of each. Returns whether it does."""
        make_rows = getattr(self._module, "make_rows", None)
        if make_rows:
            rows = {
                split: chain.from_iterable(self._sources(batches, set(fields)))
                for split, (batches, fields) in sources.items()
            }
            self._made = make_rows(rows, self._task, folder)
        return bool(make_rows)

    @property
    def is_row_by_row(self) -> bool:
        """Whether a row is made from one source row alone, so that a split may be written in parts."""
        has = partial(hasattr, self._module)
        return not has("make_rows") and (not has("split_rows") or getattr(self._module, "ROW_BY_ROW", False))

    def write(self, path: Path, batches: Iterable[list[StoredRow]], fields: Iterable[str]) -> Split:
        """Write a split, using only the columns `fields` of each row.

        Returns:
            Its part of the manifest, with token counts where there is a tokenizer.
        """
        return self._write(path, self.lines(path.stem, batches, fields))

    def lines(self, split: str, batches: Iterable[list[StoredRow]], fields: Iterable[str]) -> Iterator[bytes]:
        """The lines of a split, some at a time."""
        for written in self._rows(split, batches, set(fields)):
            yield "".join(_to_json(row) + "\n" for row in written).encode()

    def join(self, path: Path, parts: Iterable[Path]) -> Split:
        """Write a split from files that have its parts, which are removed. Returns as `write`."""

        def pieces() -> Iterator[bytes]:
            for part in parts:
                with part.open("rb") as file:
                    while piece := file.read(1 << 22):
                        yield piece
                part.unlink()

        return self._write(path, pieces())

    def _write(self, path: Path, pieces: Iterable[bytes]) -> Split:
        digest, rows, size = hashlib.sha256(), 0, 0
        with path.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
                rows += piece.count(b"\n")
        split = Split(rows=rows, bytes=size, sha256=digest.hexdigest())
        if self._tokenizer:
            split.tokens = self._counts(path)
        return split

    def finish(self, folder: Path) -> list[str]:
        """Let the module write what it makes of the finished files of `folder`. Returns the names of its files."""
        finish = getattr(self._module, "finish", None)
        return finish(folder, list(self._task.split)) if finish else []

    def _counts(self, path: Path) -> TokenCounts:
        """The tokens of the first rows of a split."""
        lengths, learned = list[int](), 0
        with path.open(encoding="utf-8") as file:
            while len(lengths) < COUNTED_ROWS and (lines := list(islice(file, COUNTED_BATCH))):
                rows = [json.loads(line) for line in lines[: COUNTED_ROWS - len(lengths)]]
                for tokens, tokens_learned in self._count(rows):
                    lengths.append(tokens)
                    learned += tokens_learned
        return TokenCounts(
            total=sum(lengths),
            learned=learned,
            mean=round(sum(lengths) / max(len(lengths), 1), 1),
            max=max(lengths, default=0),
            counted_rows=len(lengths),
        )

    def _rows(self, split: str, batches: Iterable[list[StoredRow]], kept: set[str]) -> Iterator[list[dict[str, Any]]]:
        """The rows of a split, in batches."""
        sources = self._sources(batches, kept)
        if split in self._made:
            rows = iter(self._made[split])
        elif split_rows := getattr(self._module, "split_rows", None):
            rows = iter(split_rows(chain.from_iterable(sources), split, self._task))
        else:
            yield from ([self._row(columns) for columns in batch] for batch in sources)
            return
        while batch := list(islice(rows, BATCH)):
            yield batch

    def _sources(self, batches: Iterable[list[StoredRow]], kept: set[str]) -> Iterator[list[dict[str, Any]]]:
        return ([self._columns(entry, kept) for entry in batch] for batch in batches)

    def _columns(self, entry: StoredRow, kept: set[str]) -> dict[str, Any]:
        """A row's columns, "" unless `kept`: the prompt's default context is for asking, not for rows without one."""
        columns: dict[str, Any] = {"row": entry.row}
        for name, cell in zip(self._names, entry.cells, strict=True):
            columns[name] = cell if name in kept else ""
        return columns

    def _row(self, columns: dict[str, Any]) -> dict[str, Any]:
        values = columns.copy()
        del values["row"]
        if self._row_fields:
            values = self._row_fields(values, self._prompt)
        wanted = {"input": self._prompt.write_instruction(**values), "output": self._prompt.write_response(**values)}
        return wanted | columns | wanted  # a column may be called input or output too

    def _count(self, rows: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
        """All tokens and target tokens of each sample as training/batches.py makes them, with BOS and end tokens."""
        pieces = [sample for row in rows for sample in self._prompt.samples(row)]
        texts = [text for parts in pieces for text, _ in parts]
        encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        for parts in pieces:
            lengths = [len(next(encodings).ids) + learned for _, learned in parts]
            yield 1 + sum(lengths), sum(length for length, (_, learned) in zip(lengths, parts, strict=True) if learned)
