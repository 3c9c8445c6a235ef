"""Rows that say almost the same, found among millions: MinHash for candidates, RapidFuzz for the verdict.

A row is *near* another when a model that has learnt one has in effect seen the other:

- their whole text is nearly the same (`SAME_TEXT`), or
- their keys are nearly the same (`SAME_KEY`) and so is the rest of what the task requires (`SAME_TEXT`).

So `LOL` and `LOLZ`, both "laughing out loud", are near whatever their examples; `LOL` and `ROFL` with that one
definition are not, unless their other columns agree too; nor are `FOMO` "fear of missing out" and `JOMO` "joy of
missing out". Texts are compared without case and punctuation.

Comparing every row with every held-out row would take days for a million rows. MinHash (Broder 1997) turns a text
into `BANDS` numbers such that texts which share most of their four-letter pieces very likely share one; only those
are compared letter by letter. This is datasketch's method on numpy, for a whole batch at once: 100 times as fast
as datasketch, which hashes piece by piece, and with 12 bytes a band and row instead of its sets of Python objects.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz, process

SAME_TEXT = 90  # of 100, RapidFuzz's `ratio`: two or three letters in a short line, a word in a long one
SAME_KEY = 80  # LOL and LOLZ have 86, bussin and bussing 92, FOMO and JOMO 75
PIECE = 4  # letters; three are shared by chance too often, five leave short texts with nothing in common
# Texts whose pieces overlap by 75 % (a word of ten replaced) become candidates with 99.5 %, by 65 % with 91 %, by
# 5 % with one in 160,000: 1 - (1 - overlap^ROWS)^BANDS.
BANDS, ROWS = 20, 5
MOST = 16  # candidates looked at per band: a phrase that thousands of rows share must not cost a day
_NO_WORD = re.compile(r"[\W_]+")
_MULTIPLIERS = np.random.default_rng(1997).integers(1 << 32, size=BANDS * ROWS, dtype=np.uint32) | np.uint32(1)
_MIX = [np.uint32(n) for n in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)]


class Wording(NamedTuple):
    """What is compared of a row: all its columns, and of its required ones the key and the rest."""

    whole: str
    key: str
    rest: str

    @classmethod
    def of(cls, cells: Sequence[str], key: str, rest: Sequence[int]) -> "Wording":
        """`cells` in the order of the task's columns; `rest` are the places of those required beside the key."""
        return cls(_comparable(" ".join(cells)), key, _comparable(" ".join([cells[place] for place in rest])))

    def texts(self) -> set[str]:
        """Those by which candidates are found."""
        return {self.whole, f"{self.key} {self.rest}"} if self.rest else {self.whole}


def are_near(one: Sequence[Wording], other: Sequence[Wording]) -> NDArray[np.bool_]:
    """For each pair `(one[i], other[i])` whether the two are near, by the rule above."""

    def same(field: str, threshold: int) -> NDArray[np.bool_]:
        pairs = [getattr(wording, field) for wording in one], [getattr(wording, field) for wording in other]
        return process.cpdist(*pairs, scorer=fuzz.ratio, score_cutoff=threshold, dtype=np.float32) >= threshold

    stated = np.array([bool(wording.rest) for wording in one], bool)
    return same("whole", SAME_TEXT) | (stated & same("key", SAME_KEY) & same("rest", SAME_TEXT))


def _comparable(text: str) -> str:
    """Without case and punctuation: `"Bussin', fr!"` → `"bussin fr"`."""
    return _NO_WORD.sub(" ", text.casefold()).strip() or text.casefold()


class Candidates:
    """An index of texts by MinHash: which of them may be near a new one. Every text has a number of its owner."""

    def __init__(self) -> None:
        # A band's hash and the owner's number side by side in 64 bits: a sorted array is the whole index.
        self._bands: list[list[NDArray[np.uint64]]] = [[] for _ in range(BANDS)]

    def add(self, texts: Sequence[str], owners: Sequence[int]) -> None:
        """Take in `texts` of rows `owners` (numbers below 2^32), which may repeat."""
        places = np.array(owners, np.uint64)
        for band, hashes in zip(self._bands, _band_hashes(texts), strict=True):
            band.append(hashes << np.uint64(32) | places)

    def of(self, texts: Sequence[str], askers: Sequence[int]) -> NDArray[np.uint64]:
        """The pairs to compare, `(pairs, 2)`: an asker's number and an owner's, each pair once, in order."""
        who = np.array(askers, np.uint64)
        pairs = [np.empty((0, 2), np.uint64)]
        for band, hashes in zip(self._bands, _band_hashes(texts), strict=True):
            if len(band) != 1:
                band[:] = [np.sort(np.concatenate([np.empty(0, np.uint64), *band]))]
            index = band[0]
            start = np.searchsorted(index, hashes << np.uint64(32))
            count = np.searchsorted(index, (hashes + np.uint64(1)) << np.uint64(32)) - start
            count = np.minimum(count, MOST)
            nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            owners = index[np.repeat(start, count) + nth] & np.uint64(0xFFFFFFFF)
            pairs.append(np.column_stack((np.repeat(who, count), owners)))
        return np.unique(np.concatenate(pairs), axis=0)


def _band_hashes(texts: Sequence[str]) -> NDArray[np.uint64]:
    """`(BANDS, texts)`, each below 2^32 - 1: texts with an equal one in any band are candidates."""
    blank = "\0" * (PIECE - 1)  # parts the texts, so that no piece spans two and the shortest has one
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
    bands = np.zeros((BANDS, len(texts)), np.uint64)
    for number, multiplier in enumerate(_MULTIPLIERS):
        np.multiply(pieces, multiplier, out=hashed)  # a permutation of all 32-bit numbers, as it is odd
        smallest = np.minimum.reduceat(hashed, starts)
        bands[number // ROWS] = (bands[number // ROWS] + smallest) * np.uint64(0x9E3779B97F4A7C15)
    return np.minimum(bands >> np.uint64(32), np.uint64(0xFFFFFFFE))
