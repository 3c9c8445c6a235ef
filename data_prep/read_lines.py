"""Reads records from a text file: numbered lines that can be pushed back, CSV records, JSON objects.

A CSV line that cannot be read loses only that record, with a reason.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path

from core.errors import UserError
from data_prep.clean_text import clean
from data_prep.read_python import read_python

MAX_LINE = 1_000_000  # characters; a longer line is not a row, and must not fill the memory
OPEN_QUOTE = "a quote that is never closed"
STRAY_QUOTE = "quotes out of place"
_DECODER = json.JSONDecoder(strict=False)
TOO_LONG = "a line or cell too long to read"


class _CutLine(str):
    """The beginning of a line that is too long, which stays so where it is given back."""


class NumberedLines:
    """The lines of a file, numbered from 1, that can be given back: `record` holds those taken since `begin`."""

    def __init__(self, file: TextIOWrapper) -> None:
        self._file = file
        self._returned: list[str] = []
        self.number = 0
        self.record: list[str] = []

    def __iter__(self) -> "NumberedLines":
        return self

    def __next__(self) -> str:
        line = self._returned.pop() if self._returned else self._file.readline(MAX_LINE)
        if not line:
            raise StopIteration
        self.number += 1
        self.record.append(line)
        if len(line) == MAX_LINE:
            self.record[-1] = _CutLine(line[:-1] + "\n")  # ends here, should it be given back
            while line and not line.endswith(("\n", "\r")):
                line = self._file.readline(MAX_LINE)
        if isinstance(self.record[-1], _CutLine):
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

    def ahead(self, count: int) -> list[str]:
        """The next lines, `count` at most and none after one that is too long, left in place."""
        self.begin()
        try:
            found = list(islice(self, count))
        except csv.Error:
            found = self.record[:-1]
        self.give_back(len(self.record))
        return found

    def give_back(self, count: int) -> None:
        """Put the last `count` lines of the record back: they are read again."""
        self._returned.extend(reversed(self.record[len(self.record) - count :]))
        del self.record[len(self.record) - count :]
        self.number -= count


def csv_records(lines: NumberedLines, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
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


def _printed(text: str) -> object:
    """The object in a line that Python has printed, `{'question': "What's up?"}`; None if it is none."""
    try:
        return read_python(text) if text.startswith("{'") else None
    except ValueError:
        return None


def json_objects(lines: NumberedLines, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """`(line, object)` of every line that is not blank.

    Raises:
        UserError: a line that is not one JSON object.
    """
    try:
        for line in lines:
            lines.begin()
            text = line.strip("\ufeff\x00 \t\r\n")
            if text.startswith("{") and text.endswith("},"):
                text = text[:-1]  # cut out of a list
            if not text:
                continue
            try:
                item = _DECODER.decode(text)
            except (ValueError, RecursionError):  # ValueError also where a number has 5,000 digits
                item = _printed(text)
            if not isinstance(item, dict):
                shown = text if len(text) <= 60 else f"{text[:60]}..."
                raise UserError(
                    f"{path}, line {lines.number} is not a JSON object: {clean(shown)[0]}\n"
                    f"Write one object a line; from a list of objects: jq -c '.[]' {path.name} > rows.jsonl"
                )
            yield lines.number, item
    except csv.Error:
        raise UserError(f"{path}, line {lines.number} has over {MAX_LINE:,} characters") from None
