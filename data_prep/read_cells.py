"""Reads the cells of a row: cleaned text, on lines of its own or on one, and what is no text left out.

A task whose rows are more than cells has a reader of its own, the `Reader` of its module (see tasks/chat/rows.py).
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_prep.clean_text import clean, clean_lines, key_of
from data_prep.read_python import read_python
from data_prep.read_table import NotText
from data_prep.row_store import Unusable
from data_prep.task import Task

NOT_TEXT = "a value that is not text"
KEY_PARTS = "\n"  # between the keys of the fields that are the key together; no key has a line end


def key_of_fields(cells: Sequence[str]) -> str:
    """The key of a row by the cells of the fields that are its key together, see `clean_text.key_of`."""
    return KEY_PARTS.join(map(key_of, cells))


class CellReader:
    """Turns a row's raw cells into `(key, cleaned cells, how many of them were repaired)`.

    Attributes:
        notes: how many values that are no text were left out, by field.
    """

    def __init__(self, task: Task) -> None:
        self._fields, self._forms, self._asked = list(task.data.columns), task.data.cells, task.asked
        self._required = set(task.data.required)
        self.notes = Counter[str]()

    def __call__(self, raw: Sequence[str]) -> tuple[str, list[str], int]:
        """
        Raises:
            Unusable: a field that every row needs has a list, an object or bytes.
        """
        cells, repaired = list[str](), 0
        for field, cell in zip(self._fields, raw, strict=True):
            form = self._forms.get(field)
            if form in ("lettered", "numbered"):
                cell = _choices(cell, form)
            elif isinstance(cell, NotText) and form != "json":
                cell = self._without_text(field, cell)
            text, changed = clean(cell) if form == "line" else clean_lines(cell)
            cells.append(text)
            repaired += changed
        return key_of_fields([cells[place] for place in self._asked]), cells, repaired

    def _without_text(self, field: str, cell: str) -> str:
        if field not in self._required:
            self.notes[f"values of {field} that are no text left out"] += 1
            return ""
        if cell in ("true", "false"):
            return str(cell)
        raise Unusable(NOT_TEXT, f"{field} holds {' '.join(cell.split())[:60] or 'bytes'}")


def _choices(cell: str, form: str) -> str:
    """`["one", "two"]` and `{"text": ["one", "two"], "label": ["A", "B"]}` as lines `A. one`, or `0. one`.

    Raises:
        Unusable: it is neither.
    """
    try:
        found: Any = json.loads(cell) if cell.startswith(("[", "{")) else None
        found = read_python(cell) if found is None else found
    except ValueError:
        found = None
    names: Any = None
    if isinstance(found, dict):
        found, names = found.get("text") or list(found.values()), found.get("label") or list(found)
    if isinstance(found, list | tuple) and all(isinstance(one, dict) and "text" in one for one in found):
        found, names = [one["text"] for one in found], [one.get("label", "") for one in found]
    if not isinstance(found, list | tuple) or not all(isinstance(one, str | int | float) for one in found):
        raise Unusable("no list of choices", f"it is {' '.join(cell.split())[:60]}")
    if form == "numbered":
        names = range(len(found))
    elif names is None or len(names) != len(found):
        names = [chr(ord("A") + place) for place in range(len(found))]
    return "\n".join(f"{name}. {clean(str(one))[0]}" for name, one in zip(names, found, strict=True))
