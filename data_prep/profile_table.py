"""Profiles a table that nobody has described yet: its format, and how full, varied and long each column is."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.progress import Progress
from data_prep.clean_text import clean_lines, is_json
from data_prep.read_table import NotText, plain_header
from data_prep.sources import Source, open_source
from data_prep.task import RESERVED

ROWS = 20_000  # profiled: enough for every figure here, and done in seconds
FEW = 30  # distinct values at most, of a column of labels
# Words in the headers of columns that identify or locate a row rather than describe it.
ABOUT = {"id", "ids", "uid", "uuid", "index", "no", "nr", "url", "link", "date", "time", "timestamp", "unnamed"}
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
        """One of nothing, dialogues, numbers, signs (no letters: dates, emoji), ids (or links, dates), labels, text,
        JSON; and of values that are no text lists, objects, true or false, values (of several kinds, or bytes)."""
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
        if most(r"[\W\d_]*$"):
            return "signs"
        if ABOUT & set(self.words) or most(r"(https?://\S+|[0-9a-f-]{32,36}|\d{4}-\d\d-\d\d\S*)$"):
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
    """The name of a column in templates: `Sample Question` → `sample_question`."""
    name = plain_header(column.header).replace(" ", "_")
    return f"the_{name}" if name in RESERVED or name[0].isdigit() else name


def profile_table(source: Source) -> TableProfile:
    """Raises UserError: see `open_table`."""
    table = open_source(source, None, ())
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
