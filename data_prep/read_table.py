"""Reads one file as a table: detects its format, maps its columns, and says what is wrong with a row.

A file is CSV, TSV (comma, semicolon, tab or bar), JSON Lines or other JSON (read_json.py), in any common encoding and
packed or not (unpack.py), Parquet or Arrow; or, for a task that learns plain text, a text (read_passages.py). It is
streamed, so its size does not matter. A line that cannot be read loses only that row, with a reason; a file that is not
a table raises a `UserError` that says what was found instead.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from core.errors import UserError
from data_prep.clean_text import clean
from data_prep.find_header import LINES, SEPARATOR, find_header
from data_prep.formula_cells import read_cell
from data_prep.read_json import SUFFIXES, Knows, document_rows, is_document
from data_prep.read_lines import MAX_LINE, NumberedLines, csv_records, json_objects
from data_prep.read_passages import SUFFIXES as PLAIN_TEXT
from data_prep.read_passages import passages
from data_prep.text_encoding import encoding_of
from data_prep.unpack import inner_name, open_unpacked, packing_of

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

TOO_MANY = "more cells than columns"
FORMS = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV", "|": "CSV with bars"}  # by delimiter

Names = Mapping[str, Sequence[str]] | None

# Objects whose keys are all languages, such as {"en": …, "pt-BR": …}, are a column for each: translation.en
_LANGUAGE = re.compile(r"[a-z]{2,3}([-_]\w{2,4})?")


class NotText(str):
    """A cell that is no text: a list, an object, true or false of JSON or Parquet, as JSON; "" if that cannot be."""


class Row(NamedTuple):
    """A data row as it was read.

    Attributes:
        number: 1 for the first row below the header; blank lines are not counted.
        line: the line of the file on which it begins; of a Parquet file, its number.
        cells: raw text of each field of the task; "" for a column that the source lacks, `NotText` for a value that is
            no text. None if `problem` is set.
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
        unused: the headers of the other columns.
        notes: what was read otherwise than usual, in words.
        rows: an iterator that reads on demand.
        bytes_read: how far into the file reading has got, to within a buffer.
        close: to be called at the end.
    """

    form: str
    encoding: str
    columns: dict[str, str]
    unused: list[str]
    notes: list[str]
    rows: Iterator[Row]
    bytes_read: Callable[[], int]
    close: Callable[[], None]


def open_table(path: Path, names: Names, required: Sequence[str], plain_text: str = "") -> Table:
    """Open `path`, detect its format from its contents, and map its columns.

    Args:
        names: accepted headers of each field, best first; case, spaces and underscores do not matter.
            None makes a field of every column.
        required: the fields that the source must have.
        plain_text: the field that passages of a file of plain text are read into (read_passages.py); with "" it is
            read as a table, too.

    Raises:
        UserError: no such file, not a text file, empty, no header that the task knows, a header that occurs twice, a
            line that is not JSON, a damaged Parquet file.
    """
    if path.is_file() and _begins_with(path, b"PAR1"):
        return _open_parquet(path, names, required)
    if path.is_file() and (_begins_with(path, b"ARROW1") or _begins_with(path, b"\xff\xff\xff\xff")):
        return _open_arrow(path, names, required)
    encoding, errors = encoding_of(path)
    notes = list[str]()

    def text() -> TextIOWrapper:
        return TextIOWrapper(open_unpacked(path), encoding, errors, newline="")

    suffix = Path(inner_name(path)).suffix.lower()
    if plain_text and suffix in PLAIN_TEXT:
        file = text()
        return _opened(
            path, file, "plain text", encoding, Columns({}, {plain_text: "passages"}, []), notes, _text_rows(file)
        )
    with text() as file:
        is_json = is_document(next(filter(str.strip, iter(lambda: file.readline(MAX_LINE), "")), ""), file, suffix)
    file = text()
    try:
        lines = NumberedLines(file)
        first = "" if is_json else lines.first(path)
        if is_json:
            form = "JSON"
            columns, rows = _json_rows(document_rows(file, path, _knows(names, required)), path, names, required)
        elif suffix in SUFFIXES or first.lstrip().startswith(('{"', "{'")):
            form = "JSON Lines"
            columns, rows = _json_rows(json_objects(lines, path), path, names, required)
        else:
            form, columns, rows = _csv_rows(lines, first, path, names, required, notes)
    except BaseException:
        file.close()
        raise
    return _opened(path, file, form, encoding, columns, notes, rows)


def _opened(
    path: Path, file: TextIOWrapper, form: str, encoding: str, columns: "Columns", notes: list[str], rows: Iterator[Row]
) -> Table:
    if packing := packing_of(path):
        form = f"{form} in {packing.name}"
    read = lambda: os.lseek(file.fileno(), 0, os.SEEK_CUR)  # noqa: E731
    return Table(form, encoding, columns.headers, columns.unused, notes, rows, read, file.close)


def _text_rows(file: TextIOWrapper) -> Iterator[Row]:
    for number, (line, text, problem) in enumerate(passages(NumberedLines(file)), 1):
        yield Row(number, line, None if problem else [text], problem)


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


# --- columns --------------------------------------------------------------------------------------------------


def plain_header(header: str) -> str:
    """`" Example_Sentence\\ufeff"` → `"example sentence"`; a header of signs alone, such as 🙂, stays as it is."""
    text = header.replace("\x00", "").strip("\ufeff ")
    return re.sub(r"[\W_]+", " ", text).strip().casefold() or text.replace("\ufe0f", "")


class Columns(NamedTuple):
    """Which columns the fields of a task are in.

    Attributes:
        places: field → place of its column.
        headers: field → header, cleaned.
        unused: the headers of the other columns, cleaned.
    """

    places: dict[str, int]
    headers: dict[str, str]
    unused: list[str]


def _find_columns(headers: Sequence[str], names: Names) -> dict[str, int]:
    if names is None:
        return {clean(header)[0]: place for place, header in enumerate(headers) if plain_header(header)}
    places = {plain_header(header): place for place, header in reversed(list(enumerate(headers))) if header.strip()}
    found: dict[str, int] = {}
    for field, accepted in names.items():
        wanted = (places[plain_header(name)] for name in accepted if plain_header(name) in places)
        # A column is that of the first field which it fits: with an instruction, the input is what it is about.
        place = next((place for place in wanted if place not in found.values()), None)
        if place is not None:
            found[field] = place
    return found


def _is_ambiguous(place: int, headers: Sequence[str]) -> bool:
    return Counter(plain_header(header) for header in headers)[plain_header(headers[place])] > 1


def _columns(headers: Sequence[str], path: Path, names: Names, required: Sequence[str]) -> Columns:
    """Raises UserError: a field that is required has no column, or a column that is used stands twice."""
    found = _find_columns(headers, names)
    cleaned = [clean(header)[0] for header in headers]
    for place in found.values():
        if _is_ambiguous(place, headers):
            raise UserError(f"{path} has more than one column called '{cleaned[place]}'; rename one of them")
    missing = [field for field in required if field not in found]
    if not missing or names is None:
        used = {plain_header(headers[place]) for place in found.values()}
        unused = [header for header in cleaned if plain_header(header) and plain_header(header) not in used]
        return Columns(found, {field: cleaned[place] for field, place in found.items()}, list(dict.fromkeys(unused)))
    listed = [header[:40] for header in cleaned if header]
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
    lines: NumberedLines, first: str, path: Path, names: Names, required: Sequence[str], notes: list[str]
) -> tuple[str, Columns, Iterator[Row]]:
    """Adds to `notes` what was read otherwise than a header in the first line."""

    def found_in(headers: Sequence[str]) -> int | None:
        found = _find_columns(headers, names)
        lacking = names is None or not found or any(field not in found for field in required)
        return None if lacking or any(_is_ambiguous(place, headers) for place in found.values()) else len(found)

    delimiters = list(FORMS)
    if named := SEPARATOR.fullmatch(first.strip("\ufeff\x00 \r\n")):
        delimiters = [named[1]]
        notes.append(f"its first line, {named[0]}, names the separator")
        next(lines)
        lines.first(path)
    header = find_header(lines.ahead(LINES), delimiters, found_in)
    notes += header.notes
    for _ in range(header.above):
        next(lines)
    records = csv_records(lines, header.delimiter)
    raw = [cells for _, cells, _ in islice((record for record in records if record[1]), header.records)]
    headers = raw[0] if len(raw) == 1 else header.names
    columns = _columns(headers, path, names, required)
    width = len(headers)
    while width and not headers[width - 1].strip():
        width -= 1  # a spreadsheet's empty columns at the right
    places = [columns.places.get(field, -1) for field in names or columns.places]
    form = FORMS.get(header.delimiter, f"CSV with {header.delimiter}")
    return form, columns, _fit(records, width, places)


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
            yield Row(number, line, [read_cell(cells[place]) if place >= 0 else "" for place in places], "")


# --- JSON Lines and Parquet -------------------------------------------------------------------------------------


def _json_rows(
    objects: Iterator[tuple[int, dict[str, object]]], path: Path, names: Names, required: Sequence[str]
) -> tuple[Columns, Iterator[Row]]:
    first = list(islice(objects, 100))  # an object may omit keys that others have
    headers = list(dict.fromkeys(header for _, item in first for header in _headers_of(item)))
    columns = _columns(headers, path, names, required)
    return columns, _keyed_rows(chain(first, objects), columns, headers, names)


def _headers_of(item: Mapping[str, object]) -> Iterator[str]:
    for key, value in item.items():
        if isinstance(value, dict) and value and all(_LANGUAGE.fullmatch(str(inner)) for inner in value):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield key


def _open_arrow(path: Path, names: Names, required: Sequence[str]) -> Table:
    """An Arrow file as `datasets` saves one: a stream, or the format with a footer, which is a stream in between."""
    import pyarrow
    from pyarrow import ipc

    file = pyarrow.OSFile(str(path))
    try:
        file.seek(8 if _begins_with(path, b"ARROW1") else 0)
        stream = ipc.open_stream(file)
    except (pyarrow.ArrowException, OSError) as error:
        file.close()
        raise UserError(f"{path} is an Arrow file that cannot be read: {_first_line(error)}") from None
    return _arrow_table(path, "Arrow", stream.schema, lambda columns: stream, names, required, file.tell, file.close)


def _open_parquet(path: Path, names: Names, required: Sequence[str]) -> Table:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is a Parquet file that cannot be read: {_first_line(error)}") from None
    share = path.stat().st_size / max(file.metadata.num_rows, 1)
    read = 0

    def batches(columns: list[str]) -> Iterator["RecordBatch"]:
        nonlocal read
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield batch
            read += len(batch)

    return _arrow_table(
        path, "Parquet", file.schema_arrow, batches, names, required, lambda: round(read * share), file.close
    )


def _arrow_table(
    path: Path,
    form: str,
    schema: "Schema",
    batches: Callable[[list[str]], Iterable["RecordBatch"]],
    names: Names,
    required: Sequence[str],
    bytes_read: Callable[[], int],
    close: Callable[[], None],
) -> Table:
    """Args: batches: the rows, given the top columns that are wanted of them."""
    import pyarrow

    tops = list[str]()  # the column that each header is, or is a part of
    headers = list[str]()
    for field in schema:
        struct = field.type if pyarrow.types.is_struct(field.type) else ()
        found = list(_headers_of({field.name: {inner.name: None for inner in struct}}))
        headers += found
        tops += [field.name] * len(found)

    def items() -> Iterator[tuple[int, Mapping[str, object]]]:
        read = 0
        wanted = list(dict.fromkeys(tops[place] for place in columns.places.values()))
        try:
            for batch in batches(wanted):
                for item in batch.select(wanted).to_pylist():
                    read += 1
                    yield read, item
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read beyond row {read}: {_first_line(error)}") from None

    try:
        columns = _columns(headers, path, names, required)
    except BaseException:
        close()
        raise
    rows = _keyed_rows(items(), columns, headers, names)
    return Table(form, "", columns.headers, columns.unused, [], rows, bytes_read, close)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _keyed_rows(
    items: Iterator[tuple[int, Mapping[str, object]]], columns: Columns, headers: Sequence[str], names: Names
) -> Iterator[Row]:
    """Rows of `(line, values by header)`."""
    wanted = [headers[columns.places[field]] if field in columns.places else None for field in names or columns.places]
    for number, (line, item) in enumerate(items, 1):
        yield Row(number, line, [_text_of(_value(item, header)) if header else "" for header in wanted], "")


def _value(item: Mapping[str, object], header: str) -> object:
    if header in item:
        return item[header]
    top, _, inner = header.partition(".")
    value = item.get(top)
    return value.get(inner) if isinstance(value, dict) else None


def _text_of(value: object) -> str:
    """A cell's text, `NotText` for a value that has none."""
    if type(value) is str:
        return value
    if isinstance(value, (list, dict, bool, bytes)):
        try:
            return NotText(json.dumps(value, ensure_ascii=False)) if value or value is False else ""
        except TypeError:
            return NotText()
    return "" if value is None or value != value else str(value)  # NaN is the number that is not itself
