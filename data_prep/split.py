"""Assigns rows to splits by a hash of their key, so that a row never moves when others are added or removed."""

import hashlib
from collections.abc import Mapping, Sequence

SPLITS = ("training", "validation", "test")
HASH_BITS = 62  # a share of 1.0 must still fit an SQLite integer


def hash_of(key: str, seed: int) -> int:
    """A key's hash in [0, 2^62), the same on every machine; another `seed` reassigns all rows."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") >> 64 - HASH_BITS


def ranges(validation: float, test: float) -> dict[str, tuple[int, int]]:
    """The range of hashes `[first, end)` of each split; `validation` and `test` are shares of the rows.

    Test has the lowest hashes and training the highest: a larger `validation` takes rows from training only.
    """
    one = 1 << HASH_BITS
    test_end, validation_end = round(test * one), round((test + validation) * one)
    return {"training": (validation_end, one), "validation": (test_end, validation_end), "test": (0, test_end)}


def seed_that_fills(keys: Sequence[str], splits: Mapping[str, tuple[int, int]]) -> int | None:
    """The first seed below 1000 with which none of `splits` (see `ranges`) is empty; None if there is none."""
    for seed in range(1000):
        hashes = [hash_of(key, seed) for key in keys]
        if all(any(first <= hashed < end for hashed in hashes) for first, end in splits.values()):
            return seed
    return None
