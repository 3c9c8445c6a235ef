"""Which split a row belongs to: a hash of its key decides, so a row never moves when others come or go."""

import hashlib

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
