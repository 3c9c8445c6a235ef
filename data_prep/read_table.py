"""From one file to rows: what form it has, which column is which, and what is wrong with a row.

A file is CSV, TSV (comma, semicolon, tab or bar) or JSON Lines, in any common encoding, or Parquet. It is streamed, so
its size does not matter. A line that cannot be read costs that one row, with a reason; a file that is no table at
all raises a `UserError` which says what was found instead.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from data_prep.clean_text import clean
from data_prep.read_lines import Lines, csv_records, json_objects
from data_prep.text_encoding import encoding_of

TOO_MANY = "more cells than columns"
NOT_TEXT = "a value that is not text"
FORMS = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV", "|": "CSV with bars"}  # by delimiter

Names = Mapping[str, Sequence[str]] | None


class Row(NamedTuple):
    """One data row.

    Attributes:
        number: 1 for the first row below the header; blank lines are not counted.
        line: the line of the file on which it begins; of a Parquet file, its number.
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
        form: what it is, for people: one of `FORMS`, JSON Lines or Parquet.
        encoding: the Python codec it is read with; "" of Parquet, which is no text.
        columns: the task's fields that it has, with the header of each as it stands in the file.
        rows: the rows, read as they are asked for.
        bytes_read: how far into the file the reading is, give or take a buffer.
        close: to be called at the end.
    """

    form: str
    encoding: str
    columns: dict[str, str]
    rows: Iterator[Row]
    bytes_read: Callable[[], int]
    close: Callable[[], None]


def open_table(path: Path, names: Names, required: Sequence[str]) -> Table:
    """Open `path`, find its columns and make it ready to stream.

    Args:
        names: the headers that each field of the task goes by, best first; case, spaces and underscores do not matter.
            None makes a field of every column.
        required: the fields without which a row is of no use.

    Raises:
        UserError: no such file, not a text file, empty, no header that the task knows, one that stands twice, a line
            that is not JSON, a damaged Parquet file.
    """
    if path.is_file() and _begins_with(path, b"PAR1"):
        return _open_parquet(path, names, required)
    encoding, errors = encoding_of(path)
    file = path.open(encoding=encoding, errors=errors, newline="")
    try:
        lines = Lines(file)
        first = lines.first(path)
        if path.suffix.lower() in (".jsonl", ".json", ".ndjson") or first.lstrip().startswith('{"'):
            form = "JSON Lines"
            columns, rows = _json_rows(lines, path, names, required)
        else:
            form, columns, rows = _csv_rows(lines, first, path, names, required)
    except BaseException:
        file.close()
        raise
    return Table(form, encoding, columns, rows, lambda: os.lseek(file.fileno(), 0, os.SEEK_CUR), file.close)


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


# --- columns --------------------------------------------------------------------------------------------------


def plain_header(header: str) -> str:
    """`" Example_Sentence\\ufeff"` → `"example sentence"`."""
    return re.sub(r"[\W_]+", " ", header.replace("\x00", "")).strip().casefold()


def _find_columns(headers: Sequence[str], names: Names) -> dict[str, int]:
    if names is None:
        return {clean(header)[0]: place for place, header in enumerate(headers) if plain_header(header)}
    places = {plain_header(header): place for place, header in reversed(list(enumerate(headers))) if header.strip()}
    found: dict[str, int] = {}
    for field, accepted in names.items():
        place = next((places[plain_header(name)] for name in accepted if plain_header(name) in places), None)
        if place is not None:
            found[field] = place
    return found


def _check_columns(
    found: Mapping[str, int], headers: Sequence[str], path: Path, names: Names, required: Sequence[str]
) -> None:
    counts = Counter(plain_header(header) for header in headers)
    for place in found.values():
        if counts[plain_header(headers[place])] > 1:
            raise UserError(f"{path} has more than one column called '{clean(headers[place])[0]}'; rename one of them")
    missing = [field for field in required if field not in found]
    if not missing or names is None:
        return
    listed = [clean(header)[0][:40] for header in headers if header.strip()]
    columns = ", ".join(f"'{header}'" for header in listed[:20]) + (", ..." if len(listed) > 20 else "")
    wanted = "\n".join(f"  {field}: {', '.join(names[field])}" for field in missing)
    hint = ""
    if not found:
        line = ",".join(field for field in names if field in required)
        hint = (
            f"\nIf its first line is already a row, put a line of column names above it, such as: {line}\n"
            f"If it is a table of another kind, make a task for it: make new-task NAME=mine SOURCE={path}"
        )
    raise UserError(
        f"{path} has no column for {' or '.join(missing)}. Columns found: {columns}\n"
        f"Accepted names (any case, any order):\n{wanted}{hint}"
    )


# --- CSV ------------------------------------------------------------------------------------------------------


def _csv_rows(
    lines: Lines, first: str, path: Path, names: Names, required: Sequence[str]
) -> tuple[str, dict[str, str], Iterator[Row]]:
    # The delimiter is the one under which the header holds the most names that the task knows.
    splits = {delimiter: first.split(delimiter) for delimiter in FORMS}
    delimiter = max(splits, key=lambda d: (len(_find_columns(splits[d], names)), len(splits[d])))
    records = csv_records(lines, delimiter)
    headers = next((cells for _, cells, _ in records if cells), [])
    found = _find_columns(headers, names)
    _check_columns(found, headers, path, names, required)
    width = len(headers)
    while width and not headers[width - 1].strip():
        width -= 1  # a spreadsheet's empty columns at the right
    places = [found.get(field, -1) for field in names or found]
    columns = {field: clean(headers[place])[0] for field, place in found.items()}
    return FORMS[delimiter], columns, _fit(records, width, places)


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


# --- JSON Lines and Parquet -----------------------------------------------------------------------------------


def _json_rows(lines: Lines, path: Path, names: Names, required: Sequence[str]) -> tuple[dict[str, str], Iterator[Row]]:
    objects = json_objects(lines, path)
    first = list(islice(objects, 100))  # an object may leave out what others have
    headers = list(dict.fromkeys(key for _, item in first for key in item))
    found = _find_columns(headers, names)
    _check_columns(found, headers, path, names, required)
    columns = {field: headers[place] for field, place in found.items()}
    rows = _keyed_rows(chain(first, objects), [columns.get(field) for field in names or found])
    return {field: clean(header)[0] for field, header in columns.items()}, rows


def _open_parquet(path: Path, names: Names, required: Sequence[str]) -> Table:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is a Parquet file that cannot be read: {_first_line(error)}") from None
    headers = file.schema_arrow.names
    read = 0

    def items() -> Iterator[tuple[int, Mapping[str, object]]]:
        nonlocal read
        try:
            for batch in file.iter_batches(batch_size=1024, columns=list(columns.values())):
                for item in batch.to_pylist():
                    read += 1
                    yield read, item
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read beyond row {read}: {_first_line(error)}") from None

    try:
        found = _find_columns(headers, names)
        _check_columns(found, headers, path, names, required)
    except BaseException:
        file.close()
        raise
    columns = {field: headers[place] for field, place in found.items()}
    rows = _keyed_rows(items(), [columns.get(field) for field in names or found])
    share = path.stat().st_size / max(file.metadata.num_rows, 1)
    return Table("Parquet", "", columns, rows, lambda: round(read * share), file.close)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _keyed_rows(items: Iterator[tuple[int, Mapping[str, object]]], headers: Sequence[str | None]) -> Iterator[Row]:
    """Rows of `(line, values by header)`; a header is None for a column that the source lacks."""
    for number, (line, item) in enumerate(items, 1):
        cells = [_text_of(item.get(header)) if header is not None else "" for header in headers]
        known = [cell for cell in cells if cell is not None]
        yield Row(number, line, known, "") if len(known) == len(cells) else Row(number, line, None, NOT_TEXT)


def _text_of(value: object) -> str | None:
    """A cell's text; the messages of a dialogue, a list of objects, as JSON. None for what is no text."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        try:
            return json.dumps(value, ensure_ascii=False)
        except TypeError:
            return None
    if isinstance(value, (list, dict, bool, bytes)):
        return None
    return "" if value is None or value != value else str(value)  # NaN is the number that is not itself
