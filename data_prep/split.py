"""Assigns rows to splits by a hash of their key, so that a row does not move when others are added or removed.

Groups of near-duplicates stay together: one moves when a row joins it whose key comes before the others', or when its
size would make the splits' sizes wrong.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


# --- groups of rows that stay together ------------------------------------------------------------------------------

SLACK = 0.25  # of a held-out split: how far groups may make it smaller or larger


class Group(NamedTuple):
    """Rows that go into one split: the hash that decides which, and how many they are."""

    hash: int
    size: int


class Dealt(NamedTuple):
    """The split of each group, and by split how many rows without a group it lacks, to be taken from training."""

    splits: list[str]
    lacking: dict[str, int]


def most_held_out(splits: Mapping[str, tuple[int, int]], rows: int) -> float:
    """The size of the largest group that a held-out split of a table of so many `rows` can take."""
    return (1 + SLACK) * rows * max(_share(splits, name) for name in SPLITS[1:])


def deal(groups: Sequence[Group], splits: Mapping[str, tuple[int, int]], rows: int) -> Dealt:
    """The split of each group: that of its hash, unless the groups' part of a held-out split would then be larger than
    its share by over SLACK of the split; then training. A held-out split that gets less than its share by as much takes
    the groups next to it, by their hashes, that fit; where none does, single rows.

    Args:
        rows: of the table, those without a group too.
    """
    grouped = sum(group.size for group in groups)
    wanted = {name: _share(splits, name) * grouped for name in SPLITS}
    slack = {name: SLACK * _share(splits, name) * rows for name in SPLITS}
    dealt, got = ["training"] * len(groups), Counter[str]()
    by_hash = sorted(range(len(groups)), key=lambda place: groups[place])

    def fits(name: str, group: Group) -> bool:
        return got[name] + group.size <= wanted[name] + slack[name]

    def put(place: int, name: str) -> None:
        dealt[place] = name
        got[name] += groups[place].size

    for place in by_hash:
        wish = next(name for name, (first, end) in splits.items() if first <= groups[place].hash < end)
        if wish != "training" and fits(wish, groups[place]):
            put(place, wish)
    for name in reversed(SPLITS[1:]):  # test first, whose hashes are the lowest
        for place in by_hash:
            if got[name] >= wanted[name] - slack[name]:
                break
            if dealt[place] == "training" and fits(name, groups[place]):
                put(place, name)
    lacking = {name: round(wanted[name] - got[name]) for name in SPLITS[1:] if got[name] < wanted[name] - slack[name]}
    return Dealt(dealt, lacking)


def _share(splits: Mapping[str, tuple[int, int]], name: str) -> float:
    first, end = splits[name]
    return (end - first) / (1 << HASH_BITS)
