"""Holds rows between the source and the splits in a temporary SQLite file, so that they need not fit in memory.

Rows are stored by number, so they come out in the order of the source, with an index on the hash of their key, which
decides the split. Dropped rows are recorded beside them.
"""

import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BATCH = 4096  # rows at a time, fewer where they have more than
LETTERS = 8_000_000
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

    def __init__(self, path: Path, is_made: bool = False) -> None:
        """Args: is_made: read a store that was made and committed before, also by several processes at once."""
        self.folder = path.parent
        if is_made:
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True, isolation_level=None)
            return
        self._db = sqlite3.connect(path, isolation_level=None)
        # The file is deleted if anything goes wrong, so it need not be durable.
        self._db.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;
            CREATE TABLE rows (row INTEGER PRIMARY KEY, hash INTEGER, key TEXT, cells TEXT);
            CREATE TABLE dropped
                (row INTEGER PRIMARY KEY, reason TEXT, key TEXT, of INTEGER, line INTEGER, detail TEXT);
            CREATE TABLE groups (row INTEGER PRIMARY KEY, name INTEGER);
            CREATE TABLE parts (row INTEGER PRIMARY KEY, name INTEGER);
            BEGIN;
            """
        )

    def close(self) -> None:
        self._db.close()

    def commit(self) -> None:
        """Let other processes read what has been stored."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    def take_in(self, path: Path, above: int) -> None:
        """Add all rows and drops of the store `path`, whose rows get the numbers after `above`."""
        self._db.execute("COMMIT")
        self._db.execute("ATTACH ? AS part", (str(path),))
        self._db.execute("BEGIN")
        self._db.execute("INSERT INTO rows SELECT row + ?, hash, key, cells FROM part.rows ORDER BY row", (above,))
        self._db.execute(
            "INSERT INTO dropped SELECT row + ?, reason, key, of, line, detail FROM part.dropped ORDER BY row", (above,)
        )
        self._db.execute("COMMIT")
        self._db.execute("DETACH part")
        self._db.execute("BEGIN")

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

    def move(self, row: int, hashed: int) -> None:
        """Give a row another hash, and with it another split."""
        self._db.execute("UPDATE rows SET hash = ? WHERE row = ?", (hashed, row))

    def update(self, entry: StoredRow) -> None:
        self._db.execute("UPDATE rows SET cells = ? WHERE row = ?", (_CELLS.join(entry.cells), entry.row))

    def count(self, first: int, end: int) -> int:
        """How many rows have a hash in `[first, end)`."""
        query = "SELECT count(*) FROM rows WHERE hash >= ? AND hash < ?"
        return int(self._db.execute(query, (first, end)).fetchone()[0])

    def last_row(self) -> int:
        """The highest number of a row; 0 where there is none."""
        return int(self._db.execute("SELECT coalesce(max(row), 0) FROM rows").fetchone()[0])

    def batches(self, first: int, end: int, above: int = 0, last: int | None = None) -> Iterator[list[StoredRow]]:
        """The rows with a hash in `[first, end)`, by number; rows of the current batch may be dropped meanwhile.

        Args:
            above, last: of these only the rows numbered above the one, up to the other.
        """
        query = (
            "SELECT row, key, cells FROM rows NOT INDEXED "
            "WHERE row > ? AND row <= ? AND hash >= ? AND hash < ? ORDER BY row LIMIT ?"
        )
        last = self.last_row() if last is None else last
        while batch := self._entries(query, (above, last, first, end, BATCH)):
            yield batch
            above = batch[-1].row

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
            query = f"SELECT row, key, cells FROM rows WHERE row IN ({','.join('?' * len(some))})"
            for row, key, cells in self._db.execute(query, some):
                yield StoredRow(row, key, cells.split(_CELLS))

    # --- groups of rows, each named by the smallest number of its rows ---

    def group(self, members: Iterable[tuple[int, int]]) -> None:
        """Store groups, given `(row, name)` of each row but those that groups are named by."""
        add = "INSERT OR IGNORE INTO groups VALUES (?, ?)"
        self._db.executemany(add, (pair for row, name in members for pair in ((name, name), (row, name))))
        self._db.execute("CREATE INDEX by_name ON groups (name, row)")

    def group_sizes(self) -> list[tuple[int, int]]:
        """`(name, rows)` of the groups, by name."""
        return self._db.execute("SELECT name, count(*) FROM groups GROUP BY name").fetchall()

    def groups(self) -> Iterator[tuple[int, int, str]]:
        """`(name, rows, smallest key)` of the groups, by name."""
        return self._db.execute("SELECT name, count(*), min(key) FROM groups JOIN rows USING (row) GROUP BY name")

    def grouped(self) -> Iterator[tuple[int, int, str]]:
        """`(name, row, key)` of all rows in groups; the rows may be moved meanwhile."""
        query = "SELECT name, row, key FROM groups JOIN rows USING (row) WHERE row > ? ORDER BY row LIMIT ?"
        last = 0
        while batch := self._db.execute(query, (last, BATCH)).fetchall():
            yield from batch
            last = batch[-1][1]

    def group_batches(self, name: int) -> Iterator[list[StoredRow]]:
        """The rows of a group, by number."""
        query = (
            "SELECT row, key, cells FROM groups JOIN rows USING (row) WHERE name = ? AND row > ? ORDER BY row LIMIT ?"
        )
        last = 0
        while batch := self._entries(query, (name, last, BATCH)):
            yield batch
            last = batch[-1].row

    def same_keys(self, name: int) -> Iterator[tuple[int, int]]:
        """Of a group's rows with one key each with the one before it."""
        query = "SELECT row, hash FROM groups JOIN rows USING (row) WHERE name = ? ORDER BY hash, row"
        before, hashed = 0, None
        for row, own in self._db.execute(query, (name,)):
            if own == hashed:
                yield before, row
            before, hashed = row, own

    def part(self, name: int, part_of: Callable[[int], int]) -> int:
        """Note which part of a group each row is in, by `part_of`, for `regroup`. Returns how many parts they are."""
        rows = (row for (row,) in self._db.execute("SELECT row FROM groups WHERE name = ?", (name,)))
        self._db.executemany("INSERT INTO parts VALUES (?, ?)", ((row, part_of(row)) for row in rows))
        query = "SELECT count(DISTINCT parts.name) FROM parts JOIN groups USING (row) WHERE groups.name = ?"
        return int(self._db.execute(query, (name,)).fetchone()[0])

    def regroup(self, is_better: bool) -> int:
        """Make a group of each part that was noted and has several rows, if `is_better`; forget the parts. Returns the
        number of rows in them."""
        rows = int(self._db.execute("SELECT count(*) FROM parts").fetchone()[0])
        if is_better:
            self._db.execute("DELETE FROM groups WHERE row IN (SELECT row FROM parts)")
            self._db.execute(
                "INSERT INTO groups SELECT row, name FROM parts "
                "WHERE name IN (SELECT name FROM parts GROUP BY name HAVING count(*) > 1)"
            )
        self._db.execute("DELETE FROM parts")
        return rows

    def first_ungrouped(self, first: int, end: int, most: int) -> list[tuple[int, str]]:
        """`(row, key)` of up to `most` rows of `[first, end)` without a group, those with the smallest hashes."""
        query = (
            "SELECT row, key FROM rows WHERE hash >= ? AND hash < ? AND row NOT IN (SELECT row FROM groups) "
            "ORDER BY hash, row LIMIT ?"
        )
        return self._db.execute(query, (first, end, most)).fetchall()

    # --- what was dropped ---

    def drop_counts(self) -> dict[str, int]:
        return dict(
            self._db.execute("SELECT reason, count(*) FROM dropped GROUP BY reason ORDER BY count(*) DESC, reason")
        )

    def drops(self) -> Iterator[Drop]:
        """All drops, by row number."""
        return map(Drop._make, self._db.execute("SELECT * FROM dropped ORDER BY row"))

    def _entries(self, query: str, values: Sequence[int]) -> list[StoredRow]:
        """The rows of a query, or the first of them where they are very long."""
        found, letters = list[StoredRow](), 0
        for row, key, cells in self._db.execute(query, values):
            found.append(StoredRow(row, key, cells.split(_CELLS)))
            letters += len(cells)
            if letters > LETTERS:
                break
        return found
