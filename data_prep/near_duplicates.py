"""Finds near-duplicate rows among millions: MinHash proposes candidates, RapidFuzz decides.

A row is *near* another when a model trained on one has in effect seen the other:

- their whole text is nearly the same (`SAME_TEXT`), or
- their keys are nearly the same (`SAME_KEY`) and so is the rest of what the task requires (`SAME_TEXT`).

So `LOL` and `LOLZ`, both "laughing out loud", are near whatever their examples; `LOL` and `ROFL` with that one
definition are not, unless their other columns agree too; nor are `FOMO` "fear of missing out" and `JOMO` "joy of
missing out". Texts are compared without case and punctuation. Where several fields are the key together, such as an
instruction and its input, those that are equal in both rows are left out of the comparison: one long instruction for
all rows does not make them near.

Comparing every row with every held-out row would take days for a million rows. MinHash (Broder 1997) turns a text into
numbers, each of which two texts share with a probability equal to the overlap (Jaccard) of their four-letter shingles;
`ROWS` of these numbers form a band, and only texts that share a band are compared letter by letter. This is
datasketch's method in numpy, for a batch of texts at once: 6 instead of 130 microseconds per 100 letters, and 200 bytes
per text where its sets of Python objects take several thousand.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz, process

SAME_TEXT = 90  # of 100, RapidFuzz's `ratio`: two or three letters in a short line, a word in a long one
SAME_KEY = 80  # LOL and LOLZ have 86, bussin and bussing 92, FOMO and JOMO 75
PIECE = 4  # letters of a shingle; three match by chance too often, five leave short texts with nothing in common
# Texts whose shingles overlap by 75 % (one word in ten replaced) share a band with probability 99.5 %, by 65 % with
# 91 %, by 5 % with one in 160,000: 1 - (1 - overlap^ROWS)^BANDS.
BANDS, ROWS = 20, 5
# Of those, only texts that agree in ENOUGH of the first MARKS numbers of all bands are compared: at 65 % overlap all
# but one in 3,000, at 10 % one in 100,000.
MARKS, ENOUGH = 2, 16
LOOK_UP, COMPARE = 16, 8  # limits of texts per band and rows per row: a phrase shared by thousands must not cost a day
PORTION = 1 << 16  # letters at a time, which fit the processor's cache
SHORT = 24  # letters: a definition of one or two words
_NO_WORD = re.compile(r"[\W_]+")
_NO_WORD_ASCII = {sign: " " for sign in range(128) if not chr(sign).isalnum()}
_MULTIPLIERS = np.random.default_rng(1997).integers(1 << 32, size=BANDS * ROWS, dtype=np.uint32) | np.uint32(1)
_MIX = [np.uint32(n) for n in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)]
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


class Wording(NamedTuple):
    """The text of a row that is compared: all its columns, and of the required ones the key and the rest.

    Where several fields are the key, `asked` has the text of each, and `whole` that of the other columns alone.
    """

    whole: str
    key: str
    rest: str
    asked: tuple[str, ...] = ()

    @classmethod
    def of(cls, cells: Sequence[str], key: str, rest: Sequence[int], asked: Sequence[int] = ()) -> "Wording":
        """`cells` are in the order of the task's columns; `asked` are the indices of the key, `rest` those of other
        required columns."""
        said = _comparable(" ".join([cells[place] for place in rest]))
        if len(asked) < 2:
            return cls(_comparable(" ".join(cells)), key, said)
        others = " ".join(cell for place, cell in enumerate(cells) if place not in asked)
        return cls(_comparable(others), key, said, tuple(_comparable(cells[place]) for place in asked))

    def texts(self) -> list[str]:
        """The texts that candidates are found by."""
        if self.asked:
            return list(dict.fromkeys((" ".join((*self.asked, self.whole)), " ".join((*self.asked[1:], self.whole)))))
        head = f"{self.key} {self.rest}" if self.rest else self.whole
        # `EZ easy` and `EZY easy` share half of their shingles; `easy` and `easy` all of them.
        rest = self.rest if 0 < len(self.rest) < SHORT else self.whole
        return list(dict.fromkeys((self.whole, head, rest)))


def are_near(one: Sequence[Wording], other: Sequence[Wording]) -> NDArray[np.bool_]:
    """Whether each pair `(one[i], other[i])` is near, by the rule above; shape `(len(one),)`."""
    if one and one[0].asked:
        one, other = zip(*map(_without_equals, one, other), strict=True)

    def same(field: str, threshold: int) -> NDArray[np.bool_]:
        pairs = [getattr(wording, field) for wording in one], [getattr(wording, field) for wording in other]
        return process.cpdist(*pairs, scorer=fuzz.ratio, score_cutoff=threshold, dtype=np.float32) >= threshold

    stated = np.array([bool(wording.rest) for wording in one], bool)
    return same("whole", SAME_TEXT) | (stated & same("key", SAME_KEY) & same("rest", SAME_TEXT))


def _without_equals(one: Wording, other: Wording) -> tuple[Wording, Wording]:
    """Both without the fields of their keys that are equal in them."""
    differ = [place for place, (mine, theirs) in enumerate(zip(one.asked, other.asked, strict=True)) if mine != theirs]

    def rest(wording: Wording) -> Wording:
        asked = " ".join(wording.asked[place] for place in differ)
        return wording._replace(whole=f"{asked} {wording.whole}" if asked else wording.whole, key=asked)

    return rest(one), rest(other)


def _comparable(text: str) -> str:
    """Without case and punctuation: `"Bussin', fr!"` → `"bussin fr"`."""
    low = text.casefold()
    bare = low.translate(_NO_WORD_ASCII) if low.isascii() else _NO_WORD.sub(" ", low)  # five times as fast
    return " ".join(bare.split()) or low


class Candidates:
    """A MinHash index of texts that proposes those that may be near a new one. Each belongs to a row, its owner."""

    def __init__(self) -> None:
        # The hash of a band and the index of the text share 64 bits, so that one sorted array indexes a whole band.
        # The first array of each list is sorted; those after it were added since.
        self._bands: list[list[NDArray[np.uint64]]] = [[np.empty(0, np.uint64)] for _ in range(BANDS)]
        self._marks = [np.empty((0, BANDS * MARKS), np.uint8)]
        self._owners = [np.empty(0, np.int64)]
        self._size = 0

    def add(self, texts: Sequence[str], owners: Sequence[int]) -> None:
        """Add `texts` of the rows `owners`; a row may have several texts."""
        bands, marks = _minhash(texts)
        places = np.arange(self._size, self._size + len(texts), dtype=np.uint64)
        for band, hashes in zip(self._bands, bands, strict=True):
            band.append((hashes << _HALF) | places)
        self._marks.append(marks)
        self._owners.append(np.array(owners, np.int64))
        self._size += len(texts)
        if self._size > 65_536 + 1.25 * len(self._owners[0]):
            self._put_in_order()  # thousands of small arrays would fragment the memory

    def of(self, texts: Sequence[str], askers: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs to compare, as arrays of askers' and of owners' rows: for each asker the owners that share most."""
        self._put_in_order()
        bands, marks = _minhash(texts)
        text, place = self._sharing_a_band(bands)
        parts = [slice(first, first + 100_000) for first in range(0, len(text), 100_000)]
        alike = [np.count_nonzero(marks[text[part]] == self._marks[0][place[part]], axis=1) for part in parts]
        agree = np.concatenate([np.empty(0, np.int64), *alike])
        asker, owner = np.array(askers, np.int64)[text], self._owners[0][place]
        best = np.lexsort((owner, -agree, asker))
        best = best[agree[best] >= ENOUGH]
        asker, owner = asker[best], owner[best]
        first_ones = np.arange(len(best)) - np.searchsorted(asker, asker) < COMPARE
        return asker[first_ones], owner[first_ones]

    def _sharing_a_band(self, bands: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each pair once: the index of a text asked about, and the index of one that was added."""
        pairs = [np.empty(0, np.uint64)]
        for (index,), hashes in zip(self._bands, bands, strict=True):
            text = np.argsort(hashes)  # neighbours are looked up near each other in memory
            start = np.searchsorted(index, hashes[text] << _HALF)
            text, start = text[start < len(index)], start[start < len(index)]
            there = index[start] >> _HALF == hashes[text]
            text, start = text[there], start[there]
            count = np.searchsorted(index, (hashes[text] + np.uint64(1)) << _HALF) - start
            count = np.minimum(count, LOOK_UP)
            nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            places = index[np.repeat(start, count) + nth] & _LOW
            pairs.append((np.repeat(text, count).astype(np.uint64) << _HALF) | places)
        pair = np.unique(np.concatenate(pairs))
        return (pair >> _HALF).astype(np.int64), (pair & _LOW).astype(np.int64)

    def _put_in_order(self) -> None:
        if len(self._owners) > 1:
            for band in self._bands:
                band[:] = [np.concatenate(band)]
                band[0].sort()
            self._marks = [np.concatenate(self._marks)]
            self._owners = [np.concatenate(self._owners)]


def _minhash(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Hashes `(BANDS, texts)`, below 2^32 - 1, equal for candidates; and marks `(texts, BANDS * MARKS)`."""
    letters = np.cumsum([len(text) for text in texts])
    cuts = [0, *(np.flatnonzero(np.diff(letters // PORTION)) + 1).tolist(), len(texts)]
    portions = [_minhash_portion(texts[first:end]) for first, end in pairwise(cuts)]
    return np.concatenate([bands for bands, _ in portions], axis=1), np.concatenate([marks for _, marks in portions])


def _minhash_portion(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    blank = "\0" * (PIECE - 1)  # separates the texts, so that no shingle spans two and the shortest text has one
    letters = np.frombuffer((blank + blank.join(texts) + blank).encode("utf-32-le"), np.uint32)
    starts = np.cumsum([0] + [len(text) + len(blank) for text in texts[:-1]])
    length = len(letters) - PIECE + 1
    pieces = np.zeros(length, np.uint32)
    for place, mix in enumerate(_MIX):
        pieces += letters[place : place + length] * mix
    pieces ^= pieces >> np.uint32(15)
    pieces *= _MIX[1]
    pieces ^= pieces >> np.uint32(13)
    hashed = np.empty_like(pieces)
    smallest = np.empty((BANDS * ROWS, len(texts)), np.uint32)
    for number, multiplier in enumerate(_MULTIPLIERS):
        np.multiply(pieces, multiplier, out=hashed)  # a permutation of all 32-bit numbers, as the multiplier is odd
        np.minimum.reduceat(hashed, starts, out=smallest[number])
    numbers = smallest.reshape(BANDS, ROWS, len(texts))
    bands = np.zeros((BANDS, len(texts)), np.uint64)
    for row in range(ROWS):
        bands = (bands + numbers[:, row]) * np.uint64(0x9E3779B97F4A7C15)
    marks = (numbers[:, :MARKS].reshape(BANDS * MARKS, len(texts)) * _MIX[0]) >> np.uint32(24)
    return np.minimum(bands >> _HALF, _LOW - np.uint64(1)), np.ascontiguousarray(marks.T.astype(np.uint8))
