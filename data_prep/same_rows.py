"""Merges rows with the same key and meaning, and keeps near-duplicates out of different splits."""

from collections.abc import Iterable

from rapidfuzz import fuzz

from core.progress import Progress
from data_prep.near_duplicates import SAME_TEXT, Candidates, Wording, are_near
from data_prep.row_store import Drop, RowStore, StoredRow
from data_prep.task import Task

NEAR = "near-duplicate of a held-out row"


def merge_repeated(task: Task, store: RowStore, number_of_rows: int) -> int:
    """Keep one row per key: the first, its gaps filled from rows that say the same. Returns how many were merged.

    A row that gives the key another meaning is dropped, as its example and context belong to that meaning. Where a task
    requires only the key, as dialogues do, different rows of one key are kept; all are in one split.
    """
    key = " and ".join(task.data.key)
    other = f"repeated {key}, another {' or '.join(name for name in task.data.required if name not in task.data.key)}"
    places, merged, seen = task.meaning, 0, 0

    def meaning(entry: StoredRow) -> str:
        wording = Wording.of(entry.cells, entry.key, places)
        return wording.rest if places else wording.whole

    with Progress(f"Merging repeated {key}", number_of_rows) as progress:
        for first, others in store.repeated():
            said, cells = meaning(first), first.cells
            for batch in others:
                same = [entry for entry in batch if fuzz.ratio(said, meaning(entry)) >= SAME_TEXT]
                for entry in same:
                    cells = [mine or theirs for mine, theirs in zip(cells, entry.cells, strict=True)]
                rows = {entry.row for entry in same}
                store.remove(rows)
                unlike = [entry for entry in batch if entry.row not in rows] if places else []
                store.drop([Drop(entry.row, other, entry.key, of=first.row) for entry in unlike])
                merged += len(same)
                seen += len(batch)
                progress.at(seen)
            if cells != first.cells:
                store.update(first._replace(cells=cells))
    return merged


def part_near_duplicates(task: Task, store: RowStore) -> None:
    """Drop training rows near a held-out row, and validation rows near a test row."""
    places = task.meaning

    def wordings(entries: Iterable[StoredRow]) -> dict[int, Wording]:
        return {entry.row: Wording.of(entry.cells, entry.key, places, task.asked) for entry in entries}

    def texts(said: dict[int, Wording]) -> tuple[list[str], list[int]]:
        pairs = [(text, row) for row, wording in said.items() for text in wording.texts()]
        return [text for text, _ in pairs], [row for _, row in pairs]

    held_out = Candidates()
    done, total = 0, store.count(0, task.split["training"][1])
    with Progress("Comparing with held-out rows", total) as progress:
        for held, asking in (("test", "validation"), ("validation", "training")):
            for batch in store.batches(*task.split[held]):
                held_out.add(*texts(wordings(batch)))
            for batch in store.batches(*task.split[asking]):
                mine = wordings(batch)
                asker, owner = (numbers.tolist() for numbers in held_out.of(*texts(mine)))
                theirs = wordings(store.get(sorted(set(owner))))
                near = are_near([mine[row] for row in asker], [theirs[row] for row in owner])
                found = [(row, of) for row, of, verdict in zip(asker, owner, near, strict=True) if verdict]
                nearest = dict(reversed(found))
                store.drop([Drop(row, NEAR, mine[row].key, of=of) for row, of in nearest.items()])
                done += len(batch)
                progress.at(done)
