"""Merges rows that repeat an earlier one. Rows that share its key and say something of their own are kept, and counted.

Rows with the same key (`task.data.key`, spelled the same but for case and punctuation) are a repeat only where one of
them has nothing of its own: every cell says what the earlier row's does, or is empty in one of the two. So `LOL`,
"Laughing out loud" and `lol`, "laughing out loud." are one entry, and the second's example fills a gap in the first;
`LOL`, "Lots of love" is another meaning, and `LOL` with another example is another row. All rows of a key are in one
split.
"""

import re
from collections.abc import Sequence

from rapidfuzz import fuzz

from core.artifacts import Alike
from core.progress import Progress
from data_prep.near_duplicates import SAME_TEXT, Wording
from data_prep.read_cells import key_of_fields
from data_prep.row_store import RowStore, StoredRow
from data_prep.task import Task

FAMILY = 100_000  # rows of a key that are in memory; later ones are compared with the first and with those after these


def merge_repeated(task: Task, store: RowStore, number_of_rows: int) -> Alike:
    """Merge repeats into the earlier row, whose gaps they fill, and count what became of the rows of each key.

    With `task.data.same_key: joined` one row is left of each key, with the meanings of all: "A win; The letter".
    """
    found, seen = Alike(repeats=0, meanings=0, variants=0, joined=0), 0
    with Progress(f"Merging repeated {' and '.join(task.data.key)}", number_of_rows) as progress:
        for first, others in store.repeated():
            family = _Family(task, first)
            for batch in others:
                taken = [entry.row for entry in batch if family.takes(entry, found)]
                store.remove(taken)
                seen += len(batch)
                progress.at(seen)
                if family.size > FAMILY:
                    family = _Family(task, _keep_changes(store, family))
            _keep_changes(store, family)
    return found


def _keep_changes(store: RowStore, family: "_Family") -> StoredRow:
    """Store the rows that others have filled. Returns the first of the family as it is now."""
    for entry in family.changed():
        store.update(entry)
    return family.first


class _Family:
    """The rows of one key. Those of a task that requires only the key, as dialogues do, have no meaning beside it."""

    def __init__(self, task: Task, first: StoredRow) -> None:
        self._meant, self._joins = task.meaning, task.data.same_key == "joined" and bool(task.meaning)
        # A key is spelled alike in all; the cell of a dialogue holds more than its key, its first message.
        keys = task.asked if key_of_fields([first.cells[place] for place in task.asked]) == first.key else []
        self._others = [place for place in range(len(first.cells)) if place not in keys + self._meant]
        self._first = first
        self._seen = {self._says(first)}
        # The first row of each meaning, with its cells as they are filled.
        self._of_meaning = {self._meaning(first): (first, list(first.cells))}

    def takes(self, entry: StoredRow, count: Alike) -> bool:
        """Whether `entry` adds no row of its own; what it is, is counted."""
        known = self._of_meaning.get(self._meaning(entry))
        if self._says(entry) in self._seen or (known and self._fills(known[1], entry.cells)):
            count.repeats += 1
            return True
        self._seen.add(self._says(entry))
        if known is None:
            self._of_meaning[self._meaning(entry)] = entry, list(entry.cells)
        is_variant = known is not None or self._is_nearly_the_first(entry)
        if self._joins:
            first = self._of_meaning[self._meaning(self._first)][1]
            for place in [] if is_variant else self._meant:
                first[place] = _joined(first[place], entry.cells[place])
            count.joined += 1
            return True
        count.variants += is_variant
        count.meanings += not is_variant
        return False

    @property
    def size(self) -> int:
        """How many rows of the family are in memory."""
        return len(self._seen)

    @property
    def first(self) -> StoredRow:
        """The first row, as others have filled it."""
        return self._first._replace(cells=self._of_meaning[self._meaning(self._first)][1])

    def changed(self) -> list[StoredRow]:
        """The rows that others have filled."""
        kept = self._of_meaning.values()
        return [entry._replace(cells=cells) for entry, cells in kept if entry.cells != cells]

    def _fills(self, mine: list[str], theirs: Sequence[str]) -> bool:
        """Whether nothing in `theirs` contradicts `mine`, whose gaps it then fills."""
        if any(mine[place] and theirs[place] and _said(mine[place]) != _said(theirs[place]) for place in self._others):
            return False
        mine[:] = [own or other for own, other in zip(mine, theirs, strict=True)]
        return True

    def _meaning(self, entry: StoredRow) -> int:
        return hash(tuple(_said(entry.cells[place]) for place in self._meant))

    def _says(self, entry: StoredRow) -> int:
        return hash(tuple(_said(entry.cells[place]) for place in (*self._meant, *self._others)))

    def _is_nearly_the_first(self, entry: StoredRow) -> bool:
        one, other = (Wording.of(row.cells, row.key, self._meant) for row in (self._first, entry))
        texts = (one.rest, other.rest) if self._meant else (one.whole, other.whole)
        return fuzz.ratio(*texts) >= SAME_TEXT


def _said(text: str) -> str:
    """A cell for comparison: without a full stop and the capital of a word's first letter, both of which a sentence may
    have. Other capitals (US, NaCl), signs ($5, :D) and lines carry meaning, but for a text in capitals throughout."""
    if "\n" in text:
        return text
    words = (text.lower() if " " in text and text.isupper() else text).split()
    return re.sub(r"(?<=\w)\.$", "", " ".join(word[:1].lower() + word[1:] for word in words))


def _joined(text: str, other: str) -> str:
    return f"{text.removesuffix('.')}; {other}" if text and other else text or other
