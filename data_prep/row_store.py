"""Holds rows between the source and the splits in a temporary SQLite file, so that they need not fit in memory.

Rows are stored by number, so they come out in the order of the source, with an index on the hash of their key, which
decides the split. Dropped rows are recorded beside them.
"""

import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BATCH = 4096
_CELLS = "\x1f"  # separates the cells of a row; cleaned text has no control characters


class StoredRow(NamedTuple):
    """A usable row: its number in the source, its key, and its cleaned cells in the order of the task's columns."""

    row: int
    key: str
    cells: list[str]


class Drop(NamedTuple):
    """A dropped row. `of` is the row that it repeats; `line` is set if it could not be read.

    Drops are counted by `reason`; `detail` says more about this one.
    """

    row: int
    reason: str
    key: str = ""
    of: int | None = None
    line: int | None = None
    detail: str | None = None

    def in_words(self) -> str:
        """Its detail with the row: `message 3 of row 7 holds an image`, or `row 7: it has 1200`."""
        detail = self.detail or self.reason
        if message := re.match(r"message \d+", detail):
            return f"{message[0]} of row {self.row}{detail[message.end() :]}"
        return f"row {self.row}: {detail}"


class Unusable(Exception):
    """Raised for a row that cannot be used: `Unusable(reason, detail)`, as in `Drop`."""


class RowStore:
    """Rows and drops in the SQLite file `path`, which must not exist. Not for use by two threads."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        # The file is deleted if anything goes wrong, so it need not be durable.
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
        """Store `(hash of the key, row)` pairs."""
        self._db.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?)",
            ((entry.row, hashed, entry.key, _CELLS.join(entry.cells)) for hashed, entry in entries),
        )

    def index(self) -> None:
        """Build the index; call it once, after the last `add` and before any query by hash."""
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
        """The rows with a hash in `[first, end)`, by number; rows of the current batch may be dropped meanwhile."""
        query = (
            "SELECT row, key, cells FROM rows NOT INDEXED WHERE row > ? AND hash >= ? AND hash < ? ORDER BY row LIMIT ?"
        )
        last = 0
        while batch := self._entries(query, (last, first, end, BATCH)):
            yield batch
            last = batch[-1].row

    def repeated(self) -> Iterator[tuple[StoredRow, Iterator[list[StoredRow]]]]:
        """For every key that occurs more than once its first row and, in batches, the others, which may be dropped."""
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
            # Two keys with one hash are not expected in a billion rows, but they would not be the same key.
            yield [entry for entry in batch if entry.key == first.key]

    def beyond(self, first: int, end: int, most: int) -> Iterator[list[StoredRow]]:
        """The rows of `[first, end)` beyond the `most` smallest hashes; drop each batch to get the next."""
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
        """All drops, by row number."""
        return map(Drop._make, self._db.execute("SELECT * FROM dropped ORDER BY row"))

    def _entries(self, query: str, values: Sequence[int]) -> list[StoredRow]:
        return [StoredRow(row, key, cells.split(_CELLS)) for row, key, cells in self._db.execute(query, values)]
