"""Which split a row belongs to: a hash of its key decides, so a row never moves when others come or go."""

import hashlib
from collections.abc import Mapping, Sequence

SPLITS = ("training", "validation", "test")
HASH_BITS = 62  # a share of 1.0 must still fit an SQLite integer


def hash_of(key: str, seed: int) -> int:
    """The place of a key on [0, 2^62), the same on every machine; another `seed` deals all rows anew."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") >> 64 - HASH_BITS


def ranges(validation: float, test: float) -> dict[str, tuple[int, int]]:
    """The hashes `[first, past the last)` of each split; `validation` and `test` are shares of the rows.

    Test lies at the bottom and training at the top: a larger `validation` takes rows from training only.
    """
    one = 1 << HASH_BITS
    test_end, validation_end = round(test * one), round((test + validation) * one)
    return {"training": (validation_end, one), "validation": (test_end, validation_end), "test": (0, test_end)}


def seed_that_fills(keys: Sequence[str], splits: Mapping[str, tuple[int, int]]) -> int | None:
    """The first seed that leaves none of `splits`, as `ranges` cuts them, empty; None where none of a thousand does."""
    for seed in range(1000):
        hashes = [hash_of(key, seed) for key in keys]
        if all(any(first <= hashed < end for hashed in hashes) for first, end in splits.values()):
            return seed
    return None
