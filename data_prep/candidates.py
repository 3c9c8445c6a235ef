"""Proposes which of millions of rows may be near each other: those with texts that share a band of MinHash's numbers.

What is kept of each text lies in files, a column in each, so that it need not fit in memory. A band's hashes
are put in order, `IN_MEMORY` at a time; of those that several texts have, `IN_HAND` at a time are paired.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.minhash import BANDS, MARKS, minhash
from data_prep.near_duplicates import Wording
from data_prep.workers import advance

# Only texts that agree in ENOUGH of all marks are compared: at 65 % overlap of their shingles all but one in 3,000, at
# 10 % one in 100,000.
ENOUGH = 16
REACH = 8  # neighbours in a band that a text is compared with
IN_MEMORY = 8_000_000  # texts, of 8 bytes each
IN_HAND = 500_000  # texts, of up to 300 bytes each
CHUNK = 250_000  # records of a file
BAND_FILES = [f"band-{number:02}" for number in range(BANDS)]
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)

Share = Callable[[Callable[["_Band"], None], Iterable["_Band"]], Iterable[None]]


class Signatures(NamedTuple):
    """What is kept of texts: the hashes of their bands `(BANDS, texts)`, their marks `(texts, BANDS * MARKS)`, and the
    number of the row that each belongs to, its owner."""

    bands: NDArray[np.uint32]
    marks: NDArray[np.uint8]
    owners: NDArray[np.int64]

    @classmethod
    def of(cls, said: Mapping[int, Wording]) -> "Signatures":
        """Those of rows' texts; a row may have several."""
        pairs = [(text, row) for row, wording in said.items() for text in wording.texts()]
        return cls(*minhash([text for text, _ in pairs]), np.array([row for _, row in pairs], np.int64))

    @classmethod
    def joined(cls, made: Sequence["Signatures"]) -> "Signatures":
        """Those of several calls of `of`, one after another."""
        made = made or [cls.of({})]
        return cls(
            np.concatenate([one.bands for one in made], axis=1),
            np.concatenate([one.marks for one in made]),
            np.concatenate([one.owners for one in made]),
        )


class Candidates:
    """A MinHash index of texts that proposes rows which may be near each other, in a new folder in `above`."""

    def __init__(self, above: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(dir=above, prefix="candidates-")
        self._files = [(Path(self._folder.name) / name).open("ab") for name in (*BAND_FILES, "marks", "owners")]
        self._size = 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._folder.cleanup()

    def add(self, made: Signatures) -> None:
        for file, column in zip(self._files, (*made.bands, made.marks, made.owners), strict=True):
            file.write(column.tobytes())
        self._size += len(made.owners)

    def pairs(self, share: Share = map) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pairs of rows to compare, `(one, other)` with `one < other`. What one yields may repeat another's.

        Of the texts that share a band each is proposed with the `REACH` that are most like it, so that a phrase which
        thousands share does not cost a day; in a group of rows that are near, one neighbour is enough.

        Args:
            share: has a function done for each band, by all cores or one after another.
        """
        for file in self._files:
            file.flush()
        bands = [_Band(Path(self._folder.name), self._size, number) for number in range(BANDS)]
        for band, _ in zip(bands, share(write_pairs, bands), strict=True):
            with band.pairs.open("rb") as found:
                while some := found.read(8 * CHUNK):
                    pairs = np.frombuffer(some, np.uint64)
                    yield (pairs >> _HALF).astype(np.int64), (pairs & _LOW).astype(np.int64)
            band.pairs.unlink()


class _Band(NamedTuple):
    """A band of the index in `folder`, which has `size` texts."""

    folder: Path
    size: int
    number: int

    @property
    def pairs(self) -> Path:
        """The file of its pairs, a row's number in each half of 64 bits."""
        return self.folder / f"pairs-{self.number:02}"

    def shared(self) -> Iterator[NDArray[np.uint64]]:
        """The texts whose hash others have too: hash and index in 64 bits, in order. The hashes differ between two
        arrays, unless more than `IN_MEMORY` texts have the same."""
        passes = -(-self.size // IN_MEMORY)
        for one in range(passes):
            first, end = ((1 << 32) * place // passes for place in (one, one + 1))
            found, size = list[NDArray[np.uint64]](), 0
            for start in range(0, self.size, CHUNK):
                hashes = self.read(BAND_FILES[self.number], np.uint32, 1, start, CHUNK)[:, 0].astype(np.uint64)
                numbers = hashes << _HALF | np.arange(start, start + len(hashes), dtype=np.uint64)
                found.append(numbers if passes == 1 else numbers[(hashes >= first) & (hashes < end)])
                size += len(found[-1])
                if size > 2 * IN_MEMORY:
                    yield _repeated(found)
                    found, size = [], 0
            yield _repeated(found)

    def proposed(self, shared: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The pairs among some of `shared`."""
        owners = self.gather("owners", np.int64, 1, (shared & _LOW).astype(np.int64))[:, 0]
        # Most hashes are shared by the texts of one row alone, which stand one after another.
        begins = np.flatnonzero(np.diff(shared >> _HALF, prepend=~shared[:1] >> _HALF))
        counts = np.diff(begins, append=len(shared))
        by_several = np.repeat(owners[begins] != owners[begins + counts - 1], counts)
        shared, owners = shared[by_several], owners[by_several]
        index = (shared & _LOW).astype(np.int64)
        following = self.gather(BAND_FILES[(self.number + 1) % BANDS], np.uint32, 1, index)[:, 0]
        # Within a band, texts that share the next one, too, stand side by side.
        order = np.lexsort((following, shared >> _HALF))
        hashes = (shared >> _HALF)[order]
        marks = self.gather("marks", np.uint8, BANDS * MARKS, index)[order]
        owners = owners[order]
        found = [np.empty(0, np.uint64)]
        for reach in range(1, min(REACH, len(order) - 1) + 1):
            place = np.flatnonzero(hashes[reach:] == hashes[:-reach])
            for part in np.array_split(place, len(place) // 100_000 + 1):
                alike = np.count_nonzero(marks[part] == marks[part + reach], axis=1) >= ENOUGH
                one, other = owners[part[alike]], owners[part[alike] + reach]
                first, last = np.minimum(one, other), np.maximum(one, other)
                found.append((first.astype(np.uint64) << _HALF | last.astype(np.uint64))[first < last])
        return np.unique(np.concatenate(found))

    def read(self, column: str, kind: type, width: int, start: int, count: int) -> NDArray[Any]:
        """Records `[start, start + count)` of a file, `(records, width)`; fewer at its end."""
        size = width * np.dtype(kind).itemsize
        with (self.folder / column).open("rb", 0) as file:
            file.seek(start * size)
            return np.frombuffer(file.read(count * size), kind).reshape(-1, width)

    def gather(self, column: str, kind: type, width: int, index: NDArray[np.int64]) -> NDArray[Any]:
        """The records at `index`, `(len(index), width)`: read in order, as those of a file are side by side."""
        order = np.argsort(index)
        ordered = index[order]
        found: NDArray[Any] = np.empty((len(index), width), kind)
        place = 0
        while place < len(ordered):
            start = int(ordered[place])
            end = int(np.searchsorted(ordered, start + CHUNK))
            count = int(ordered[end - 1]) - start + 1
            found[order[place:end]] = self.read(column, kind, width, start, count)[ordered[place:end] - start]
            place = end
        return found


def write_pairs(band: _Band) -> None:
    """Write the file of a band's pairs."""
    with band.pairs.open("wb") as file:
        for shared in band.shared():
            start = 0
            while start < len(shared):
                end = start + IN_HAND
                if end < len(shared):  # where the hash changes, unless it is the same in all of them
                    last = int(np.searchsorted(shared, shared[end] >> _HALF << _HALF))
                    end = last if last > start else end
                file.write(band.proposed(shared[start:end]).tobytes())
                start = end
    advance(1)


def _repeated(found: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """All numbers of `found`, in order, whose upper half others have too."""
    numbers = np.concatenate(found) if found else np.empty(0, np.uint64)
    numbers.sort()
    same = numbers[1:] >> _HALF == numbers[:-1] >> _HALF
    is_shared = np.zeros(len(numbers), bool)
    is_shared[1:] |= same
    is_shared[:-1] |= same
    return numbers[is_shared]
