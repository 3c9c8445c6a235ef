"""Profiles a table that nobody has described yet: its format, and how full, varied and long each column is."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.progress import Progress
from data_prep.clean_text import clean_lines, is_json
from data_prep.read_passages import SUFFIXES, is_text
from data_prep.read_table import NotText, plain_header
from data_prep.sources import Source, open_source
from data_prep.task import RESERVED
from data_prep.text_encoding import SAMPLE
from data_prep.unpack import inner_name, open_unpacked

ROWS = 20_000  # profiled: enough for every figure here, and done in seconds
FEW = 30  # distinct values at most, of a column of labels
# Words in the headers of columns that identify or locate a row rather than describe it.
ABOUT = {
    *("id", "ids", "uid", "uuid", "guid", "index", "no", "nr", "sku", "code", "unnamed", "url", "link", "date", "time"),
    *("timestamp", "datetime", "created", "updated", "email", "mail", "phone", "address", "street", "zip", "postcode"),
}
_MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_CLOCK = r"([ ,T]+(at )?\d{1,2}[:.]\d\d\S*( ?[ap]\.?m\.?)?( \S{1,6})?)?"
_DATE = (
    r"(?i)((mon|tue|wed|thu|fri|sat|sun)[a-z]*,? )?(\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}|"
    rf"\d{{1,2}}\w{{0,2}}[ -]{_MONTH}[ ,-]+\d{{2,4}}|{_MONTH} (\d{{1,2}}\w{{0,2}},? )?\d{{4}}){_CLOCK}$"
)
_ADDRESS = (
    r"(?i)([a-z][a-z0-9+.-]*://\S+|www\.\S+|[\w.+-]+@[\w-]+\.[\w.-]+|@\w+|(\d+\w?,? [\w.' -]+|[\w.' -]+ \d+\w?)(,.*)?)$"
)
_STREET = r"(?i).*\b(street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|court|ct|square|way|rue|\w+straße)\b"
# A hash, or one token with a digit in it, such as ORD-2024-17 and img_0042.png.
_ID = r"([0-9a-f-]{32,64}|(?=\S*\d)[A-Za-z]{0,8}[-_#:/.]?[\w.-]{1,24})$"
# JSON or Python of messages, in an object of their own or not.
_DIALOGUE = (
    r"""(?s)(\{\s*"\w+"\s*: )?(array\( ?)?[\[(]\s*\{.*?['"](role|from|author|speaker|human|input|type)['"]\s*:"""
)


@dataclass
class Column:
    """A column.

    Attributes:
        header: as written in the file.
        cells: cleaned text with its lines, "" if empty; JSON of what is no text.
        values: of how many rows the value is no text.
    """

    header: str
    cells: list[str]
    values: int = 0

    @cached_property
    def words(self) -> list[str]:
        return plain_header(self.header).split()

    @cached_property
    def filled(self) -> list[str]:
        return [cell for cell in self.cells if cell]

    @cached_property
    def different(self) -> int:
        return len(set(self.filled))

    @cached_property
    def mean_length(self) -> float:
        """Mean number of characters of the cells that are not empty."""
        return sum(map(len, self.filled)) / max(len(self.filled), 1)

    @cached_property
    def holds(self) -> str:
        """One of nothing, dialogues, numbers, signs (no letters, such as emoji), dates, addresses (of the web, mail or
        post), ids, labels, text, JSON; and of values that are no text lists, objects, true or false, values (of several
        kinds, or bytes)."""
        if not self.filled:
            return "nothing"

        def most(pattern: str) -> bool:
            return sum(bool(re.match(pattern, cell)) for cell in self.filled) >= 0.9 * len(self.filled)

        if most(_DIALOGUE):
            return "dialogues"
        if self.values >= 0.9 * len(self.filled):
            kinds = {"[": "lists", "{": "objects", "t": "true or false", "f": "true or false"}
            found = {kinds.get(cell[0], "values") for cell in self.filled}
            return found.pop() if len(found) == 1 else "values"
        if self.filled[0][0] in "[{" and sum(map(is_json, self.filled)) >= 0.9 * len(self.filled):
            return "JSON"
        if most(r"[-+]?[\d.,]+( ?%)?$"):
            return "numbers"
        if most(_DATE):
            return "dates"
        if most(r"[\W\d_]*$"):
            return "signs"
        if most(_ADDRESS) and (most(r"\S+$") or most(_STREET)):
            return "addresses"
        is_named_so = ABOUT & set(self.words) and len(self.words) < 4 and self.mean_length < 60
        if is_named_so or (most(_ID) and self.different > 0.9 * len(self.filled)):
            return "ids"
        return "labels" if self.different <= min(FEW, len(self.filled) / 5) else "text"


@dataclass
class TableProfile:
    """The profile of a table.

    Attributes:
        form, notes: see `read_table.Table`.
        rows: how many of the first `ROWS` could be read.
        unreadable: why the others could not, counted.
        is_whole: whether the table has no more rows.
    """

    form: str
    encoding: str
    notes: list[str]
    columns: list[Column]
    rows: int
    unreadable: Counter[str]
    is_whole: bool


def called(wanted: Sequence[str], columns: Iterable[Column]) -> list[Column]:
    """The columns whose header is, or contains as a word, one of `wanted`; best first."""
    ranked = []
    for place, column in enumerate(columns):
        ranks = [rank for rank, word in enumerate(wanted) if word in column.words]
        if ranks:
            ranked.append((len(column.words) > 1, ranks[0], place, column))
    return [column for *_, column in sorted(ranked, key=lambda entry: entry[:3])]


def field_of(column: Column) -> str:
    """The name of a column in templates: `Sample Question` → `sample_question`, `🙂` → `slightly_smiling_face`."""
    name = plain_header(column.header).replace(" ", "_")
    if not re.fullmatch(r"\w+", name):
        said = " ".join(unicodedata.name(sign, "") for sign in name).lower()
        name = "_".join(re.findall("[a-z]+", said)) or "column"
    return f"the_{name}" if name in RESERVED or name[0].isdigit() else name


def profile_table(source: Source) -> TableProfile:
    """Raises UserError: see `open_table`."""
    table = open_source(source, None, (), "text" if _is_text(source.files[0]) else "")
    rows, unreadable, is_whole = list[list[str]](), Counter[str](), True
    values = [0] * len(table.columns)
    try:
        with Progress(f"Looking at {source.name}", ROWS) as progress:
            for row in table.rows:
                if row.number > ROWS:
                    is_whole = False
                    break
                if row.cells is None:
                    unreadable[row.problem] += 1
                else:
                    no_text = [isinstance(cell, NotText) for cell in row.cells]
                    values = [count + more for count, more in zip(values, no_text, strict=True)]
                    read = zip(row.cells, no_text, strict=True)
                    rows.append([(cell or "?") if is_value else clean_lines(cell)[0] for cell, is_value in read])
                progress.at(row.number)
    finally:
        table.close()
    columns = [
        Column(header, [row[place] for row in rows], values[place])
        for place, header in enumerate(table.columns.values())
    ]
    return TableProfile(table.form, table.encoding, table.notes, columns, len(rows), unreadable, is_whole)


def _is_text(path: Path) -> bool:
    """Whether a file is plain text, of which passages are rows."""
    suffix = Path(inner_name(path)).suffix.lower() if path.is_file() else ""
    if suffix not in SUFFIXES:
        return False
    with open_unpacked(path) as file:
        lines = file.read(SAMPLE).decode(errors="replace").splitlines()
    return suffix != ".txt" or is_text(lines)


def show_profile(profile: TableProfile, source: Source, console: Console) -> None:
    """Print the profile, one line per column."""
    some = "" if profile.is_whole else "the first "
    encoding = profile.encoding and f", {profile.encoding.removesuffix('-sig').upper()}"
    console.print(f"{source}: {profile.form}{encoding}, {some}{profile.rows:,} rows\n")
    for note in profile.notes:
        console.print(f"   {note}\n", soft_wrap=True)
    table = Table(box=None, padding=(0, 0, 0, 3), header_style="bold", expand=True)
    table.add_column("column", max_width=24, no_wrap=True)
    for title in ("filled", "different", "letters"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("holds", no_wrap=True)
    table.add_column("for example", no_wrap=True, ratio=1)
    for column in profile.columns:
        lengths = [len(cell) for cell in column.filled] or [0]
        example = column.filled[0] if column.filled else ""
        table.add_row(
            Text(column.header),
            f"{len(column.filled) / max(profile.rows, 1):.0%}",
            f"{column.different:,}",
            f"{min(lengths)}-{max(lengths)}",
            column.holds,
            Text(" ".join(example[:200].split()), style="dim"),
        )
    console.print(table)
    for problem, count in profile.unreadable.items():
        console.print(f"   {count:,} rows cannot be read: {problem}")
    console.print()
