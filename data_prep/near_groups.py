"""Keeps rows that are near each other together: each group of near-duplicates, and all rows of a key, in one split.

A chain of near rows is one group, so that no row stands in another split than one near to it, and none is dropped for
that. `split.deal` finds the split of each group, so that splits keep their sizes.

Rows made from one formula ("How do I cancel my order of shoes?", "... of lamps?") can be a single group that is too
large to be held out. What most rows of such a group share says nothing about which of them are alike, so they are
compared again without the words that stand in over half of them.

Rows and groups are in the store, and which rows are together in a file of 8 bytes a row that the system keeps in memory
as far as there is room.
"""

import mmap
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.artifacts import Alike
from core.progress import Progress
from data_prep.candidates import Candidates, Signatures
from data_prep.minhash import BANDS
from data_prep.near_duplicates import Wording, are_near, comparable
from data_prep.read_cells import key_of_fields
from data_prep.row_store import RowStore, StoredRow
from data_prep.split import SPLITS, Group, deal, hash_of, most_held_out
from data_prep.task import Task
from data_prep.work_folder import WorkFolder
from data_prep.workers import advance

AT_ONCE = 20_000  # pairs whose texts are in memory, or fewer with
LETTERS = 20_000_000  # in their rows
WORDS = 1_000_000  # of a group that are counted; then the rarest are forgotten
ROUNDS = 3  # of comparing without common words, each of which may leave groups that share other words

Batches = Iterable[Sequence[StoredRow]]


class Groups:
    """Sets of the rows 1 to `last`, each named by its smallest number, in a file without a name in `folder`."""

    def __init__(self, last: int, folder: Path) -> None:
        size = 8 * (last + 1)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self._above = memoryview(self._map).cast("q")  # of each row one of its set with a smaller number; 0: none

    def close(self) -> None:
        self._above.release()
        self._map.close()

    def join(self, one: int, other: int) -> None:
        one, other = sorted((self.name(one), self.name(other)))
        if one != other:
            self._above[other] = one

    def name(self, row: int) -> int:
        above, name = self._above, row
        while above[name]:
            name = above[name]
        while row != name:
            above[row], row = name, above[row]
        return name

    def members(self) -> Iterator[tuple[int, int]]:
        """`(row, name of its set)` of each row that was joined to a smaller one, in order."""
        step = 1 << 20
        for start in range(0, len(self._above), step):
            joined = np.flatnonzero(np.frombuffer(self._above[start : start + step], np.int64)) + start
            yield from ((row, self.name(row)) for row in joined.tolist())


def group_near_duplicates(task: Task, store: RowStore, count: Alike, at_work: WorkFolder | None = None) -> None:
    """Give all rows of a group one split, by their hashes in `store`. What was found is added to `count`.

    Args:
        at_work: where all cores are used.
    """
    total = store.count(*task.all_hashes)
    with Progress("Comparing rows", total) as progress:
        with closing(Groups(store.last_row(), store.folder)) as groups:
            _join_keys(store.repeated(), groups)
            wording = _Wordings(task)
            made = _signatures(task, store, at_work, progress)
            _join_near(made, store, wording, groups, at_work)
            store.group(groups.members())
        most = most_held_out(task.split, total)
        for _ in range(ROUNDS):
            large = [name for name, size in store.group_sizes() if size > most]
            parts = sum(_part_by_formula(task, store, name, progress) for name in large)
            rows = store.regroup(parts > len(large))
            if parts <= len(large):
                break
            count.formula_rows = max(count.formula_rows or 0, rows)
    _deal(task, store, count)


class _Wordings:
    """Gives the wording of a row, without the words that are `common` to all."""

    def __init__(self, task: Task, common: frozenset[str] = frozenset()) -> None:
        self._meaning, self._asked, self._common = task.meaning, task.asked, common

    def __call__(self, entry: StoredRow) -> Wording:
        if not self._common:
            return Wording.of(entry.cells, entry.key, self._meaning, self._asked)
        words = (comparable(cell).split() for cell in entry.cells)
        cells = [" ".join(word for word in some if word not in self._common) for some in words]
        said = Wording.of(cells, key_of_fields([cells[place] for place in self._asked]), self._meaning, self._asked)
        return said._replace(rest=said.rest or " ") if self._meaning else said  # nothing left is the same in both


def _join_keys(families: Iterator[tuple[StoredRow, Iterator[list[StoredRow]]]], groups: Groups) -> None:
    for first, others in families:
        for batch in others:
            for entry in batch:
                groups.join(first.row, entry.row)


def _signatures(task: Task, store: RowStore, at_work: WorkFolder | None, progress: Progress) -> Iterator[Signatures]:
    """Those of all rows, in order."""
    if at_work:
        store.commit()
        jobs = (_Rows(task, at_work.store, above, last) for above, last in at_work.ranges(store.last_row()))
        yield from at_work.workers.map(sign, jobs, progress)
        return
    wording = _Wordings(task)
    for batch in store.batches(*task.all_hashes):
        yield Signatures.of({entry.row: wording(entry) for entry in batch})
        progress.advance(len(batch))


class _Rows(NamedTuple):
    """Rows of the store in a file: those numbered above the one, up to the other."""

    task: Task
    store: Path
    above: int
    last: int


def sign(rows: _Rows) -> Signatures:
    """The signatures of all texts of some rows."""
    with closing(RowStore(rows.store, is_made=True)) as store:
        wording = _Wordings(rows.task)
        made = []
        for batch in store.batches(*rows.task.all_hashes, rows.above, rows.last):
            made.append(Signatures.of({entry.row: wording(entry) for entry in batch}))
            advance(len(batch))
    return Signatures.joined(made)


def _join_near(
    made: Iterable[Signatures],
    store: RowStore,
    wording: Callable[[StoredRow], Wording],
    groups: Groups,
    at_work: WorkFolder | None = None,
) -> None:
    """Join the rows that are near each other in the wording that `wording` gives them, of those with signatures."""
    at_once = 1000
    with closing(Candidates(store.folder)) as index:
        for signatures in made:
            index.add(signatures)
        with Progress("Pairing rows", BANDS) as progress:
            share = partial(at_work.workers.map, progress=progress) if at_work else map
            for ones, others in index.pairs(share):
                start = 0
                while start < len(ones):
                    part = slice(start, start := start + at_once)
                    letters = _join_pairs(ones[part].tolist(), others[part].tolist(), store, wording, groups)
                    at_once = max(16, min(AT_ONCE, at_once * LETTERS // max(letters, 1)))


def _join_pairs(
    ones: list[int],
    others: list[int],
    store: RowStore,
    wording: Callable[[StoredRow], Wording],
    groups: Groups,
) -> int:
    """Join those of some pairs that are near. Returns the number of letters that were in memory for it."""
    # A pair whose rows are together already, by way of others, need not be compared.
    pairs = [pair for pair in zip(ones, others, strict=True) if groups.name(pair[0]) != groups.name(pair[1])]
    rows = list(store.get(sorted({row for pair in pairs for row in pair})))
    said = {entry.row: wording(entry) for entry in rows}
    near = are_near([said[one] for one, _ in pairs], [said[other] for _, other in pairs])
    for pair, verdict in zip(pairs, near, strict=True):
        if verdict:
            groups.join(*pair)
    return sum(len(cell) for entry in rows for cell in entry.cells)


def _part_by_formula(task: Task, store: RowStore, name: int, progress: Progress) -> int:
    """Part a group by what is not common to most of its rows. Returns in how many parts: 1 where nothing is common."""
    counts, size = Counter[str](), 0
    for batch in store.group_batches(name):
        for entry in batch:
            counts.update({word for cell in entry.cells for word in comparable(cell).split()})
        size += len(batch)
        if len(counts) > WORDS:
            counts = Counter({word: number for word, number in counts.items() if number > size // 100})
    common = frozenset(word for word, number in counts.items() if 2 * number > size)
    with closing(Groups(store.last_row(), store.folder)) as groups:
        if not common:
            return store.part(name, lambda row: name)
        for first, other in store.same_keys(name):
            groups.join(first, other)
        wording = _Wordings(task, common)

        def made() -> Iterator[Signatures]:
            for batch in store.group_batches(name):
                yield Signatures.of({entry.row: wording(entry) for entry in batch})
                progress.advance(len(batch))

        _join_near(made(), store, wording, groups)
        return store.part(name, groups.name)


def _deal(task: Task, store: RowStore, count: Alike) -> None:
    """Move groups to the splits that they are dealt to."""
    total = store.count(*task.all_hashes)
    # The smallest key decides, so that the order of the rows does not.
    found = [(name, Group(hash_of(key, task.seed), size)) for name, size, key in store.groups()]
    dealt = deal([group for _, group in found], task.split, total)
    split_of = dict(zip((name for name, _ in found), dealt.splits, strict=True))
    moved = 0

    def move(keys: Iterable[tuple[int, str]], split: str) -> None:
        nonlocal moved
        first, end = task.split[split]
        for row, key in keys:
            own = hash_of(key, task.seed)
            if not first <= own < end:
                store.move(row, first + own % (end - first))
                moved += 1

    for name, row, key in store.grouped():
        move([(row, key)], split_of[name])
    for split, lacking in dealt.lacking.items():
        move(store.first_ungrouped(*task.split["training"], lacking), split)
    # Where no group fits and there are no other rows, a held-out split that is too large is better than none.
    sizes = {name: group.size for name, group in found if split_of[name] == "training"}
    left = sorted(sizes, key=sizes.__getitem__)
    for split in SPLITS[1:]:
        if len(left) > 1 and not store.count(*task.split[split]):
            name = left.pop(0)
            move([(entry.row, entry.key) for batch in store.group_batches(name) for entry in batch], split)
    count.groups = len(found)
    count.grouped_rows = sum(group.size for _, group in found)
    count.largest_group = max((group.size for _, group in found), default=0)
    count.moved = moved
