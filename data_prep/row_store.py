"""The rows on their way from the source to the splits, in a temporary SQLite file: a gigabyte of them fits any memory.

Rows are kept by number, so they come out in the order of the source, with an index on the hash of their key, which
is the split. What is dropped is noted beside them, one line each.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BATCH = 4096
_CELLS = "\x1f"  # parts the cells of a row; cleaned text has no control characters


class StoredRow(NamedTuple):
    """A row that stands: its number in the source, its key, its cleaned cells in the order of the task's columns."""

    row: int
    key: str
    cells: list[str]


class Drop(NamedTuple):
    """A row that does not, and why. `of` is the row it repeats; `line` is given where it could not be read.

    Rows are counted by `reason`; `detail` is what it was in this one.
    """

    row: int
    reason: str
    key: str = ""
    of: int | None = None
    line: int | None = None
    detail: str | None = None


class Unusable(Exception):
    """A row cannot be used: `Unusable(reason, detail)`, as in `Drop`."""


class RowStore:
    """Rows and drops in the SQLite file `path`, which must not exist. Not for use by two threads."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        # The file is thrown away if anything goes wrong, so nothing is spent on its safety.
        self._db.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;
            CREATE TABLE rows (row INTEGER PRIMARY KEY, hash INTEGER, key TEXT, cells TEXT);
            CREATE TABLE dropped
                (row INTEGER PRIMARY KEY, reason TEXT, key TEXT, of INTEGER, line INTEGER, detail TEXT);
            BEGIN;
            """
        )

    def close(self) -> None:
        self._db.close()

    def add(self, entries: Iterable[tuple[int, StoredRow]]) -> None:
        """Keep `(hash of the key, row)` pairs."""
        self._db.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?)",
            ((entry.row, hashed, entry.key, _CELLS.join(entry.cells)) for hashed, entry in entries),
        )

    def index(self) -> None:
        """To be called once, between the last `add` and anything that asks by hash."""
        self._db.execute("CREATE INDEX by_hash ON rows (hash)")

    def drop(self, drops: Sequence[Drop]) -> None:
        self.remove([drop.row for drop in drops])
        self._db.executemany("INSERT INTO dropped VALUES (?, ?, ?, ?, ?, ?)", drops)

    def remove(self, rows: Iterable[int]) -> None:
        self._db.executemany("DELETE FROM rows WHERE row = ?", ((row,) for row in rows))

    def update(self, entry: StoredRow) -> None:
        self._db.execute("UPDATE rows SET cells = ? WHERE row = ?", (_CELLS.join(entry.cells), entry.row))

    def count(self, first: int, end: int) -> int:
        """How many rows have a hash in `[first, end)`."""
        query = "SELECT count(*) FROM rows WHERE hash >= ? AND hash < ?"
        return int(self._db.execute(query, (first, end)).fetchone()[0])

    def batches(self, first: int, end: int) -> Iterator[list[StoredRow]]:
        """The rows with a hash in `[first, end)`, by number; those of a batch may be dropped while it is at hand."""
        query = (
            "SELECT row, key, cells FROM rows NOT INDEXED WHERE row > ? AND hash >= ? AND hash < ? ORDER BY row LIMIT ?"
        )
        last = 0
        while batch := self._entries(query, (last, first, end, BATCH)):
            yield batch
            last = batch[-1].row

    def repeated(self) -> Iterator[tuple[StoredRow, Iterator[list[StoredRow]]]]:
        """For every key that stands more than once its first row and, in batches, the others; those may be dropped."""
        query = "SELECT hash FROM rows WHERE hash > ? GROUP BY hash HAVING count(*) > 1 ORDER BY hash LIMIT ?"
        last = -1
        while hashes := [hashed for (hashed,) in self._db.execute(query, (last, BATCH))]:
            for last in hashes:
                [first] = self._entries("SELECT row, key, cells FROM rows WHERE hash = ? ORDER BY row LIMIT 1", (last,))
                yield first, self._others(last, first)

    def _others(self, hashed: int, first: StoredRow) -> Iterator[list[StoredRow]]:
        query = "SELECT row, key, cells FROM rows WHERE hash = ? AND row > ? ORDER BY row LIMIT ?"
        last = first.row
        while batch := self._entries(query, (hashed, last, BATCH)):
            last = batch[-1].row
            # Two keys of one hash are not to be expected in a billion rows; they are not the same all the same.
            yield [entry for entry in batch if entry.key == first.key]

    def beyond(self, first: int, end: int, most: int) -> Iterator[list[StoredRow]]:
        """The rows of `[first, end)` after the `most` with the smallest hashes; drop each batch to get the next."""
        query = "SELECT row, key, '' FROM rows WHERE hash >= ? AND hash < ? ORDER BY hash, row LIMIT ? OFFSET ?"
        while batch := self._entries(query, (first, end, BATCH, most)):
            yield batch

    def get(self, rows: Sequence[int]) -> Iterator[StoredRow]:
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            yield from self._entries(
                f"SELECT row, key, cells FROM rows WHERE row IN ({','.join('?' * len(some))})", some
            )

    def drop_counts(self) -> dict[str, int]:
        return dict(
            self._db.execute("SELECT reason, count(*) FROM dropped GROUP BY reason ORDER BY count(*) DESC, reason")
        )

    def drops(self) -> Iterator[Drop]:
        """By row number."""
        return map(Drop._make, self._db.execute("SELECT * FROM dropped ORDER BY row"))

    def _entries(self, query: str, values: Sequence[int]) -> list[StoredRow]:
        return [StoredRow(row, key, cells.split(_CELLS)) for row, key, cells in self._db.execute(query, values)]
