"""Reads one file as a table: detects its format, maps its columns, and says what is wrong with a row.

A file is CSV, TSV (comma, semicolon, tab or bar), JSON Lines or other JSON (read_json.py), in any common encoding and
packed or not (unpack.py), or Parquet. It is streamed, so its size does not matter. A line that cannot be read loses
only that row, with a reason; a file that is not a table raises a `UserError` that says what was found instead.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from data_prep.clean_text import clean
from data_prep.read_json import SUFFIXES, Knows, document_rows, is_document
from data_prep.read_lines import MAX_LINE, NumberedLines, csv_records, json_objects
from data_prep.text_encoding import encoding_of
from data_prep.unpack import inner_name, open_unpacked, packing_of

TOO_MANY = "more cells than columns"
NOT_TEXT = "a value that is not text"
FORMS = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV", "|": "CSV with bars"}  # by delimiter

Names = Mapping[str, Sequence[str]] | None


class Row(NamedTuple):
    """A data row as it was read.

    Attributes:
        number: 1 for the first row below the header; blank lines are not counted.
        line: the line of the file on which it begins; of a Parquet file, its number.
        cells: raw text of each field of the task; "" for a column that the source lacks. None if `problem` is set.
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
        form: the format as it is shown to people: one of `FORMS`, JSON Lines or Parquet.
        encoding: the Python codec it is read with; "" for Parquet, which is binary.
        columns: the task's fields that it has, with the header of each as written in the file.
        rows: an iterator that reads on demand.
        bytes_read: how far into the file reading has got, to within a buffer.
        close: to be called at the end.
    """

    form: str
    encoding: str
    columns: dict[str, str]
    rows: Iterator[Row]
    bytes_read: Callable[[], int]
    close: Callable[[], None]


def open_table(path: Path, names: Names, required: Sequence[str]) -> Table:
    """Open `path`, detect its format from its contents, and map its columns.

    Args:
        names: accepted headers of each field, best first; case, spaces and underscores do not matter.
            None makes a field of every column.
        required: the fields that the source must have.

    Raises:
        UserError: no such file, not a text file, empty, no header that the task knows, a header that occurs twice, a
            line that is not JSON, a damaged Parquet file.
    """
    if path.is_file() and _begins_with(path, b"PAR1"):
        return _open_parquet(path, names, required)
    encoding, errors = encoding_of(path)

    def text() -> TextIOWrapper:
        return TextIOWrapper(open_unpacked(path), encoding, errors, newline="")

    suffix = Path(inner_name(path)).suffix.lower()
    with text() as file:
        is_json = is_document(next(filter(str.strip, iter(lambda: file.readline(MAX_LINE), "")), ""), file, suffix)
    file = text()
    try:
        lines = NumberedLines(file)
        first = "" if is_json else lines.first(path)
        if is_json:
            form = "JSON"
            columns, rows = _json_rows(document_rows(file, path, _knows(names, required)), path, names, required)
        elif suffix in SUFFIXES or first.lstrip().startswith('{"'):
            form = "JSON Lines"
            columns, rows = _json_rows(json_objects(lines, path), path, names, required)
        else:
            form, columns, rows = _csv_rows(lines, first, path, names, required)
    except BaseException:
        file.close()
        raise
    if packing := packing_of(path):
        form = f"{form} in {packing.name}"
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


def _knows(names: Names, required: Sequence[str]) -> Knows:
    def knows(headers: list[str]) -> bool:
        found = _find_columns(headers, names)
        return names is not None and bool(found) and all(field in found for field in required)

    return knows


# --- CSV ------------------------------------------------------------------------------------------------------


def _csv_rows(
    lines: NumberedLines, first: str, path: Path, names: Names, required: Sequence[str]
) -> tuple[str, dict[str, str], Iterator[Row]]:
    # The delimiter is the one that splits the header into the most names that the task knows.
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
            cells += [""] * (
                width - len(cells)
            )  # people who write CSV by hand omit the commas of empty cells at the end
        if problem:
            yield Row(number, line, None, problem)
        else:
            yield Row(number, line, [cells[place] if place >= 0 else "" for place in places], "")


# --- JSON Lines and Parquet -------------------------------------------------------------------------------------


def _json_rows(
    objects: Iterator[tuple[int, dict[str, object]]], path: Path, names: Names, required: Sequence[str]
) -> tuple[dict[str, str], Iterator[Row]]:
    first = list(islice(objects, 100))  # an object may omit keys that others have
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
    """A cell's text; a list of objects (the messages of a dialogue) as JSON. None if it is not text."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        try:
            return json.dumps(value, ensure_ascii=False)
        except TypeError:
            return None
    if isinstance(value, (list, dict, bool, bytes)):
        return None
    return "" if value is None or value != value else str(value)  # NaN is the number that is not itself
