"""Numbers that texts which are alike share: MinHash (Broder 1997), of all texts of a batch at once.

Each number is the smallest of one hash over a text's shingles of four letters; two texts share it with a probability
equal to the overlap (Jaccard) of their shingles. `ROWS` of these numbers form a band; texts that share a band are worth
a comparison. This is datasketch's method with 32-bit hashes, in C (minhash.c), or in numpy where there is no compiler:
1 or 5 instead of 130 microseconds per 100 letters.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.c_build import NoLibrary, compiled

PIECE = 4  # letters of a shingle; three match by chance too often, five leave short texts with nothing in common
# Texts whose shingles overlap by 75 % (one word in ten replaced) share a band with probability 99.5 %, by 65 % with
# 91 %, by 5 % with one in 160,000: 1 - (1 - overlap^ROWS)^BANDS.
BANDS, ROWS = 20, 5
MARKS = 2  # the first numbers of each band, of which a byte each is kept
PORTION = 1 << 16  # letters at a time, which fit the processor's cache
_MULTIPLIERS = np.random.default_rng(1997).integers(1 << 32, size=BANDS * ROWS, dtype=np.uint32) | np.uint32(1)
_MIX = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F], np.uint32)


def minhash(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Hashes of the bands `(BANDS, texts)`, and marks `(texts, BANDS * MARKS)`."""
    if not texts:
        return np.empty((BANDS, 0), np.uint32), np.empty((0, BANDS * MARKS), np.uint8)
    letters = np.cumsum([len(text) for text in texts])
    cuts = [0, *(np.flatnonzero(np.diff(letters // PORTION)) + 1).tolist(), len(texts)]
    portions = [_minhash(texts[first:end]) for first, end in pairwise(cuts)]
    return np.concatenate([bands for bands, _ in portions], axis=1), np.concatenate([marks for _, marks in portions])


def _minhash(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    blank = "\0" * (PIECE - 1)  # separates the texts, so that no shingle spans two and the shortest text has one
    letters = np.frombuffer((blank + blank.join(texts) + blank).encode("utf-32-le"), np.uint32)
    starts = np.cumsum([0] + [len(text) + len(blank) for text in texts], dtype=np.int64)
    library = _library()
    numbers = _smallest_in_c(library, letters, starts) if library else smallest(letters, starts)
    numbers = numbers.reshape(BANDS, ROWS, len(texts))
    bands = np.zeros((BANDS, len(texts)), np.uint64)
    for row in range(ROWS):
        bands = (bands + numbers[:, row]) * np.uint64(0x9E3779B97F4A7C15)
    marks = (numbers[:, :MARKS].reshape(BANDS * MARKS, len(texts)) * _MIX[0]) >> np.uint32(24)
    return (bands >> np.uint64(32)).astype(np.uint32), np.ascontiguousarray(marks.T.astype(np.uint8))


def smallest(letters: NDArray[np.uint32], starts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The smallest value of each hash over each text's shingles, `(BANDS * ROWS, texts)`.

    Args:
        letters: all texts in UTF-32 with PIECE - 1 blanks before, between and after them.
        starts: where the shingles of each text begin, and where those of the last end: `(texts + 1,)`.
    """
    pieces = np.zeros(starts[-1], np.uint32)
    for place, mix in enumerate(_MIX):
        pieces += letters[place : place + len(pieces)] * mix
    pieces ^= pieces >> np.uint32(15)
    pieces *= _MIX[1]
    pieces ^= pieces >> np.uint32(13)
    hashed = np.empty_like(pieces)
    found = np.empty((BANDS * ROWS, len(starts) - 1), np.uint32)
    for number, multiplier in enumerate(_MULTIPLIERS):
        np.multiply(pieces, multiplier, out=hashed)  # a permutation of all 32-bit numbers, as the multiplier is odd
        np.minimum.reduceat(hashed, starts[:-1], out=found[number])
    return found


def _smallest_in_c(library: Any, letters: NDArray[np.uint32], starts: NDArray[np.int64]) -> NDArray[np.uint32]:
    found = np.empty((len(starts) - 1, BANDS * ROWS), np.uint32)
    library.minhash(
        letters.ctypes.data,
        starts.ctypes.data,
        len(starts) - 1,
        _MIX.ctypes.data,
        _MULTIPLIERS.ctypes.data,
        len(_MULTIPLIERS),
        found.ctypes.data,
    )
    return np.ascontiguousarray(found.T)


@cache
def _library() -> Any:
    """minhash.c for this processor; None without a compiler."""
    from ctypes import c_ssize_t, c_void_p

    try:
        library: Any = compiled(Path(__file__).with_name("minhash.c"), [])
    except NoLibrary:
        return None  # numpy finds the same numbers
    library.minhash.restype = None
    library.minhash.argtypes = [c_void_p, c_void_p, c_ssize_t, c_void_p, c_void_p, c_ssize_t, c_void_p]
    return library
