"""From bytes on disk to rows: the encoding, the delimiter, which column is which, and what is wrong with a line.

A source is CSV, TSV (comma, semicolon, tab or bar) or JSON Lines, in any common encoding. It is streamed, so its
size does not matter. A line that cannot be read costs that one row, with a reason; a file that is no table at
all raises a `UserError` which says what was found instead.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from data_prep.clean_text import clean
from data_prep.text_encoding import encoding_of
from nemo_configs.command_line import UserError

MAX_LINE = 1_000_000  # characters; a longer line is no row, and must not fill the memory
OPEN_QUOTE = "a quote that is never closed"
STRAY_QUOTE = "quotes out of place"
TOO_LONG = "a line or cell too long to read"
TOO_MANY = "more cells than columns"
NOT_TEXT = "a value that is not text"


class Row(NamedTuple):
    """One data row.

    Attributes:
        number: 1 for the first row below the header; blank lines are not counted.
        line: the line of the file on which it begins.
        cells: raw text by field of the task; "" for a column that the source lacks. None where `problem` is set.
        problem: why the row cannot be used, or "".
    """

    number: int
    line: int
    cells: list[str] | None
    problem: str


@dataclass
class Table:
    """An open source.

    Attributes:
        encoding: the Python codec it is read with.
        columns: the task's fields that it has, with the header of each as it stands in the file.
        rows: the rows, read as they are asked for.
    """

    encoding: str
    columns: dict[str, str]
    rows: Iterator[Row]
    _file: TextIOWrapper

    @property
    def bytes_read(self) -> int:
        """How far into the file the reading is, give or take a buffer."""
        return os.lseek(self._file.fileno(), 0, os.SEEK_CUR)

    def close(self) -> None:
        self._file.close()


def open_table(path: Path, names: Mapping[str, Sequence[str]], required: Sequence[str]) -> Table:
    """Open `path`, find its columns and make it ready to stream.

    Args:
        names: the headers that each field of the task goes by, best first; case, spaces and underscores do not matter.
        required: the fields without which a row is of no use.

    Raises:
        UserError: no such file, not a text file, empty, no header that the task knows, a line that is not JSON.
    """
    encoding, errors = encoding_of(path)
    file = path.open(encoding=encoding, errors=errors, newline="")
    try:
        lines = _Lines(file)
        first = lines.first(path)
        if path.suffix.lower() in (".jsonl", ".json", ".ndjson") or first.lstrip().startswith('{"'):
            columns, rows = _json_rows(lines, path, names, required)
        else:
            columns, rows = _csv_rows(lines, first, path, names, required)
    except BaseException:
        file.close()
        raise
    return Table(encoding, columns, rows, file)


# --- lines ----------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a file, numbered from 1, that can be given back: `record` holds those taken since `begin`."""

    def __init__(self, file: TextIOWrapper) -> None:
        self._file = file
        self._returned: list[str] = []
        self.number = 0
        self.record: list[str] = []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._returned.pop() if self._returned else self._file.readline(MAX_LINE)
        if not line:
            raise StopIteration
        self.number += 1
        self.record.append(line)
        if len(line) == MAX_LINE:
            self.record[-1] = line[:-1] + "\n"  # ends here, should it be given back
            while line and not line.endswith(("\n", "\r")):
                line = self._file.readline(MAX_LINE)
            raise csv.Error(TOO_LONG)
        return line

    def first(self, path: Path) -> str:
        """The first line that is not blank, left in place."""
        try:
            line = next(line for line in self if line.strip("\ufeff\x00 \t\r\n"))
        except StopIteration:
            raise UserError(f"{path} is empty") from None
        except csv.Error:
            raise UserError(f"{path} begins with a line of over {MAX_LINE:,} characters: not a table") from None
        self.give_back(1)
        return line

    def begin(self) -> None:
        self.record.clear()

    def give_back(self, count: int) -> None:
        """Put the last `count` lines of the record back: they are read again."""
        self._returned.extend(reversed(self.record[len(self.record) - count :]))
        del self.record[len(self.record) - count :]
        self.number -= count


# --- columns --------------------------------------------------------------------------------------------------


def _plain(header: str) -> str:
    """`" Example_Sentence\\ufeff"` → `"example sentence"`."""
    return re.sub(r"[\W_]+", " ", header.replace("\x00", "")).strip().casefold()


def _find_columns(headers: Sequence[str], names: Mapping[str, Sequence[str]]) -> dict[str, int]:
    places = {_plain(header): place for place, header in reversed(list(enumerate(headers))) if header.strip()}
    found: dict[str, int] = {}
    for field, accepted in names.items():
        place = next((places[_plain(name)] for name in accepted if _plain(name) in places), None)
        if place is not None:
            found[field] = place
    return found


def _check_columns(
    found: Mapping[str, int],
    headers: Sequence[str],
    path: Path,
    names: Mapping[str, Sequence[str]],
    required: Sequence[str],
) -> None:
    missing = [field for field in required if field not in found]
    if not missing:
        return
    listed = [clean(header)[0][:40] for header in headers if header.strip()]
    columns = ", ".join(f"'{header}'" for header in listed[:20]) + (", ..." if len(listed) > 20 else "")
    wanted = "\n".join(f"  {field}: {', '.join(names[field])}" for field in missing)
    hint = ""
    if not found:
        line = ",".join(field for field in names if field in required)
        hint = f"\nIf its first line is already a row, put a line of column names above it, such as: {line}"
    raise UserError(
        f"{path} has no column for {' or '.join(missing)}. Columns found: {columns}\n"
        f"Accepted names (any case, any order):\n{wanted}{hint}"
    )


# --- CSV ------------------------------------------------------------------------------------------------------


def _csv_rows(
    lines: _Lines, first: str, path: Path, names: Mapping[str, Sequence[str]], required: Sequence[str]
) -> tuple[dict[str, str], Iterator[Row]]:
    # The delimiter is the one under which the header holds the most names that the task knows.
    splits = {delimiter: first.split(delimiter) for delimiter in ",;\t|"}
    delimiter = max(splits, key=lambda d: (len(_find_columns(splits[d], names)), len(splits[d])))
    records = _csv_records(lines, delimiter)
    headers = next((cells for _, cells, _ in records if cells), [])
    found = _find_columns(headers, names)
    _check_columns(found, headers, path, names, required)
    width = len(headers)
    while width and not headers[width - 1].strip():
        width -= 1  # a spreadsheet's empty columns at the right
    places = [found.get(field, -1) for field in names]
    return {field: clean(headers[place])[0] for field, place in found.items()}, _fit(records, width, places)


def _csv_records(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """`(line, cells, problem)` of every record that is not blank.

    Python's parser is lenient: one quote that is never closed makes it swallow rows up to the next quote, or to
    the end of the file, without a word. In strict mode it stops; then only the line where the quote opened is
    lost, and reading goes on with the line after it.
    """

    def parse(source: Iterable[str]) -> Iterator[list[str]]:
        return csv.reader(source, delimiter=delimiter, strict=True, skipinitialspace=True)

    space_after_quote = re.compile(f'" +(?=[{re.escape(delimiter)}\r\n])')
    reader = parse(lines)
    while True:
        lines.begin()
        start = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = _problem(str(error), len(lines.record))
            lines.give_back(len(lines.record) - 1)
            reader = parse(lines)
            # `"Woke" ,"aware"` is the one slip whose meaning is beyond doubt.
            tidy = space_after_quote.sub('"', lines.record[0])
            try:
                cells = next(parse([tidy])) if problem == STRAY_QUOTE else []
            except csv.Error:
                cells = []
            if not cells:
                yield start, [], problem
                continue
        if len(cells) > 1 or (cells and cells[0].strip()):
            yield start, cells, ""


def _problem(error: str, lines: int) -> str:
    if lines > 1 or "unexpected end" in error:
        return OPEN_QUOTE
    return TOO_LONG if "field larger" in error or TOO_LONG in error else STRAY_QUOTE


def _fit(records: Iterator[tuple[int, list[str], str]], width: int, places: list[int]) -> Iterator[Row]:
    for number, (line, cells, problem) in enumerate(records, 1):
        if not problem and len(cells) != width:
            if any(cell.strip() for cell in cells[width:]):
                problem = TOO_MANY
            cells += [""] * (width - len(cells))  # by hand, people leave out the commas of empty cells at the end
        if problem:
            yield Row(number, line, None, problem)
        else:
            yield Row(number, line, [cells[place] if place >= 0 else "" for place in places], "")


# --- JSON Lines -----------------------------------------------------------------------------------------------


def _json_rows(
    lines: _Lines, path: Path, names: Mapping[str, Sequence[str]], required: Sequence[str]
) -> tuple[dict[str, str], Iterator[Row]]:
    objects = _json_objects(lines, path)
    first = list(islice(objects, 100))  # an object may leave out what others have
    headers = list(dict.fromkeys(key for _, item in first for key in item))
    found = _find_columns(headers, names)
    _check_columns(found, headers, path, names, required)
    columns = {field: headers[place] for field, place in found.items()}

    def rows() -> Iterator[Row]:
        for number, (line, item) in enumerate(chain(first, objects), 1):
            values = [item.get(columns[field]) if field in columns else None for field in names]
            if any(isinstance(value, (list, dict, bool)) for value in values):
                yield Row(number, line, None, NOT_TEXT)
            else:
                yield Row(number, line, ["" if value is None else str(value) for value in values], "")

    return {field: clean(header)[0] for field, header in columns.items()}, rows()


def _json_objects(lines: _Lines, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        for line in lines:
            lines.begin()
            text = line.strip("\ufeff\x00 \t\r\n")
            if not text:
                continue
            try:
                item = json.loads(text, strict=False)
            except (ValueError, RecursionError):  # ValueError also where a number has 5,000 digits
                item = None
            if not isinstance(item, dict):
                shown = text if len(text) <= 60 else f"{text[:60]}..."
                raise UserError(
                    f"{path}, line {lines.number} is not a JSON object: {clean(shown)[0]}\n"
                    f"Write one object a line; from a list of objects: jq -c '.[]' {path.name} > rows.jsonl"
                )
            yield lines.number, item
    except csv.Error:
        raise UserError(f"{path}, line {lines.number} has over {MAX_LINE:,} characters") from None
