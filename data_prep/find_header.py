"""Finds the header of a CSV: spreadsheets put titles above it, spread it over two lines, or name the separator first.

    sep=;                                      Excel's own first line
    Support, June 2024;;;                      a title
    Customer;;Agent;                           names of groups over ...
    Name;Question;Name;Answer                  ... the names of columns: "Customer Question", "Agent Answer"

A first line that is like the rows below it, as it has a number over numbers, a question over questions or a label that
occurs below, is a row: the columns are then called "column 1", "column 2" and so on. What is read otherwise than as a
header in the first line is said in the table's notes.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple

DELIMITERS = (",", ";", "\t", "|")
LINES = 12  # looked at
LONGEST_NAME = 40  # letters of a column's name
SEPARATOR = re.compile(r'"?sep=(.)"?[,;\t|]*', re.IGNORECASE)  # of Excel; a tab may be meant by the letter itself
# What a line below the header says about columns, not about a row: types and units, or Qualtrics' own names.
_ABOUT_COLUMN = re.compile(
    r"\([^(){}]{1,30}\)|\[[^\[\]{}'\"]{1,30}\]|<[^<>]{1,30}>|(text|string|str|int|integer|float|number|varchar)(\(\d+\))?",
    re.IGNORECASE,
)
_VALUE = re.compile(r"[-+]?[\d.,]+ ?%?|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}\S*|https?://\S+|[\w.+-]+@[\w-]+\.[\w.-]+")
_SENTENCE = re.compile(r"(\S+\s+){3,}\S+[.!]\W*$")  # a header may be a question, and seldom ends with a full stop
# A header of a survey is a question, too, but then what stands below it are answers.
_QUESTION = re.compile(
    r".*\S\s*[?？؟]\W*$|(what|whats|who|whose|which|when|where|why|how|is|are|do|does|did|can|could|should|will)\b(\s+\S+){2,}$",
    re.IGNORECASE | re.DOTALL,
)
_YEAR = re.compile(r"(19|20)\d\d")
_IMPORT_ID = re.compile(r'\{"ImportId":.*\}')


class Header(NamedTuple):
    """A header.

    Attributes:
        names: of the columns; "" for one without.
        above: lines before it.
        records: it takes, 1 or 2, 0 where there is none; a line below it that describes the columns is counted, too.
        notes: what was read otherwise than as a header in the first line, in words.
    """

    delimiter: str
    names: list[str]
    above: int
    records: int
    notes: list[str]


def find_header(
    sample: Sequence[str], delimiters: Sequence[str], found_in: Callable[[Sequence[str]], int | None]
) -> Header:
    """The header of a CSV.

    Args:
        sample: its first lines, which are not all blank.
        found_in: how many of the task's columns some names have; None if one that is needed is missing or stands
            twice. Always None where there is no task yet: then the form of the lines decides.
    """
    tables = {delimiter: _records(sample, delimiter) for delimiter in delimiters}
    tried = [(start, taken, names, d) for d, records in tables.items() for start, taken, names in _candidates(records)]
    fitting = [
        (place, taken, -count, -len(names), names, d)
        for place, taken, names, d in tried
        if (count := found_in(names)) is not None
    ]
    without = [d for d, records in tables.items() if found_in(_numbered(records[0][1])) is not None]
    if fitting:
        place, taken, *_, names, delimiter = min(fitting, key=lambda one: one[:4])
    elif without:
        delimiter = max(without, key=lambda d: len(tables[d][0][1]))
        place, taken, names = 0, 0, _numbered(tables[delimiter][0][1])
    else:
        # The delimiter of which the most rows have as many cells as the header; of those, that of the longest header.
        ranked = {d: _by_form(records) for d, records in tables.items()}
        delimiter = max(ranked, key=lambda d: (round(_agreement(tables[d], ranked[d])), len(ranked[d][2])))
        place, taken, names = ranked[delimiter]
    records = tables[delimiter]
    notes = list[str]()
    if above := [cell for _, cells in records[:place] for cell in cells if cell]:
        notes.append(f"left out above its header: {_shown(above)}")
    if not taken:
        notes.append(f"its first line is a row, not a header; its columns are called {_shown(names)}")
    if taken == 2:
        notes.append(f"two header lines are read as one: {_shown(_named(names))}")
    below = [cells for _, cells in records[place + taken : place + taken + 2]] if taken else []
    about = max((n for n, cells in enumerate(below, 1) if _describes(cells, names, n)), default=0)
    if taken == 1 and not about and _is_second_header([cells for _, cells in records[place:]]):
        about = 1
    if about:
        taken += about
        notes.append(f"left out below its header: {_shown(_named(below[0]))}")
    return Header(delimiter, names, records[place][0] if place else 0, taken, notes)


def _records(sample: Sequence[str], delimiter: str) -> list[tuple[int, list[str]]]:
    """`(lines before it, trimmed cells)` of each record that is not blank."""
    reader, records, start = csv.reader(sample, delimiter=delimiter, skipinitialspace=True), [], 0
    try:
        for cells in reader:
            trimmed = [cell.strip("\ufeff\x00 \t\r\n") for cell in cells]
            while trimmed and not trimmed[-1]:
                trimmed.pop()  # a spreadsheet's empty columns at the right
            if trimmed:
                records.append((start, trimmed))
            start = reader.line_num
    except csv.Error:
        pass  # the header stands before what cannot be read, or nowhere
    return records or [(0, [""])]


def _candidates(records: Sequence[tuple[int, list[str]]]) -> list[tuple[int, int, list[str]]]:
    """`(place, records taken, names)` of what could be the header, the first line by itself first."""
    found = list[tuple[int, int, list[str]]]()
    for place, (_, cells) in enumerate(records):
        if place + 1 < len(records) and _is_grouped(records[place:]):
            found.append((place, 2, _joined(cells, records[place + 1][1])))
        else:
            found.append((place, 1, cells))
        if place + 1 < len(records) and len(_named(cells)) <= len(_named(records[place + 1][1])):
            found.append((place, 2, _joined(cells, records[place + 1][1])))
    return found


def _by_form(records: Sequence[tuple[int, list[str]]]) -> tuple[int, int, list[str]]:
    """The header as the form of the lines shows it, where there is no task whose columns are known."""
    usual = Counter(len(_named(cells)) for _, cells in records[1:]).most_common(1)[0][0] if len(records) > 1 else 0
    for place, (_, cells) in enumerate(records):
        if place + 1 < len(records) and _is_grouped(records[place:]):
            return place, 2, _joined(cells, records[place + 1][1])
        is_title = len(_named(cells)) <= min(2, usual / 2) and bool(cells[0])
        if not is_title:
            if place == 0 and _is_row([cells for _, cells in records]):
                return 0, 0, _numbered(cells)
            return place, 1, cells
    return 0, 1, records[0][1]


def _numbered(cells: Sequence[str]) -> list[str]:
    return [f"column {number}" for number in range(1, len(cells) + 1)]


def _is_row(records: Sequence[Sequence[str]]) -> bool:
    """Whether the first record is like those below it, rather than the names of their columns."""
    first, rows = records[0], records[1:]
    if len(rows) < 3:
        return False
    like = 0
    for place, cell in enumerate(first):
        below = [cells[place] for cells in rows if place < len(cells) and cells[place]]
        values = sum(bool(_VALUE.fullmatch(text)) for text in below) >= 0.8 * len(below) > 0
        if bool(_VALUE.fullmatch(cell)) != values and cell and below:
            if values or cell.isdigit():
                return False  # a name over numbers, or a number, as pandas numbers columns, over text
        elif values and not (_YEAR.fullmatch(cell) and not all(map(_YEAR.fullmatch, below))):
            like += 1  # but a year may be the name of a column of numbers
        is_label = len(set(below)) <= len(below) / 2 and all(_is_name(text) for text in below)
        like += is_label and cell in below
        for form in (_SENTENCE, _QUESTION):
            like += bool(form.match(cell)) and _most(form, below)
    return like > 0


def are_questions(cells: Sequence[str]) -> bool:
    """Whether most of the cells are questions, with or without their mark."""
    return _most(_QUESTION, cells)


def _most(form: re.Pattern[str], cells: Sequence[str]) -> bool:
    return sum(bool(form.match(cell)) for cell in cells) > len(cells) / 2


def _is_second_header(records: Sequence[Sequence[str]]) -> bool:
    """Whether the second record names the columns again: it has a name over numbers, too."""
    first, second, rows = records[0], records[1] if len(records) > 1 else [], records[2:]
    if len(rows) < 3 or len(_named(second)) < len(_named(first)) or not all(_is_name(cell) for cell in second):
        return False
    for place, cells in enumerate(zip(first, second, strict=False)):
        below = [row[place] for row in rows if place < len(row)]
        if all(map(_VALUE.fullmatch, below)) and not any(map(_VALUE.fullmatch, cells)) and all(cells):
            return True
    return False


def _agreement(records: Sequence[tuple[int, list[str]]], header: tuple[int, int, list[str]]) -> float:
    """The share of rows below the header that have no more cells than it, and mostly as many."""
    place, taken, names = header
    rows = [len(cells) for _, cells in records[place + taken :]]
    return sum(len(names) / 2 <= count <= len(names) for count in rows) / max(len(rows), 1)


def _is_grouped(records: Sequence[tuple[int, list[str]]]) -> bool:
    """Whether the first record has names of groups of columns, and the second the names in each group.

    A group's name stands over its first column, or over each. Rows below look otherwise than names do.
    """
    upper, lower = records[0][1], records[1][1]
    gap = any(cell and not after for cell, after in pairwise(upper)) or len(upper) < len(lower)
    repeated = len(set(upper)) < len(upper)
    # SurveyMonkey's second line has names only where a question has several columns, or an open answer.
    whole = all(over or under for over, under in zip_longest(upper, lower, fillvalue=""))
    if not (upper[0] and (gap or repeated) and len(_named(upper)) > 1 and whole and len(lower) > 2 and any(lower)):
        return False
    if len(lower) < len(upper) or not all(_is_name(cell) for cell in _named(lower)):
        return False
    rows = [cells for _, cells in records[2:]]
    return bool(rows) and all(any(not _is_name(cell) for cell in cells) for cells in rows)


def _joined(upper: Sequence[str], lower: Sequence[str]) -> list[str]:
    """`["Customer", "", "Agent"]` and `["Name", "Question", "Name"]` → `["Customer Name", "Customer Question", …]`."""
    names, group = list[str](), ""
    for over, under in zip_longest(upper, lower, fillvalue=""):
        group = over or group
        names.append(" ".join(filter(None, (group, under))))
    return names


def _is_name(cell: str) -> bool:
    return len(cell) <= LONGEST_NAME and not re.search(r"[.!?]$|^[\W\d_]*$|\d{4}", cell)


def _describes(cells: Sequence[str], names: Sequence[str], number: int) -> bool:
    """Whether the line `number` below the header tells of the columns, as does what stands between.

    The first repeats their names, or has types or units; Qualtrics puts its own names below the questions.
    """
    filled = _named(cells)
    if all(_IMPORT_ID.fullmatch(cell) for cell in filled):
        return True
    if number > 1 or len(filled) < len(_named(names)) / 2:
        return False
    return list(cells) == list(names) or all(_ABOUT_COLUMN.fullmatch(cell) for cell in filled)


def _named(cells: Sequence[str]) -> list[str]:
    return [cell for cell in cells if cell]


def _shown(cells: Sequence[str]) -> str:
    return ", ".join(f"'{' '.join(cell.split())[:30]}'" for cell in cells[:4]) + ", …" * (len(cells) > 4)
