"""Reads the rows of JSON that is not one object a line: lists, of one line or many, and whole tables in an object.

    [{"question": …, "answer": …}, …]                        a list of rows; it is read row by row
    [[{"role": "user", …}, …], …]                            of dialogues: each becomes the column `messages`
    [["question", "answer"], ["Why?", "So."], …]             of cells; the first is the header if the task knows it
    [["Why?", "So."], …]                                     else (pandas: orient="values") they are `column 1`, …
    {"data": [{…}, …]}, {"version": …, "rows": [{…}, …]}     the one list of rows in an object
    {"question": ["Why?", …], "answer": ["So.", …]}          columns
    {"question": {"0": "Why?", …}, "answer": {…}}            pandas: orient="columns", its usual one
    {"0": {"question": "Why?", "answer": "So."}, …}          orient="index"; keys that are no numbers: the column `key`
    {"lol": "laughing out loud", …}                          the columns `key` and `value`
    {"columns": ["question", …], "index": …, "data": [[…]]}  orient="split"
    {"schema": …, "data": [{…}, …]}                          orient="table"
    {                                                        objects of many lines each, one after another
      "question": …

An object is read whole, so it must not be too large.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from core.errors import UserError
from data_prep.read_lines import MAX_LINE

SUFFIXES = (".json", ".jsonl", ".ndjson")
LONGEST, WHOLE = 10_000_000, 200_000_000  # characters of a row in a list, and of an object that is a table
CHUNK = 1 << 16
MANY = 10  # entries of an object that are rows rather than columns; a task needs as many
_DECODER = json.JSONDecoder(strict=False)
_SPACE = re.compile(r"[\s\ufeff\x00]*")
_LIST = re.compile(r"\[\s*([\[{]|$)")
_DESCRIPTIONS = ("features", "columns", "fields", "schema", "metadata", "info")  # lists of these are no rows

Item = dict[str, Any]
# Whether headers have all the columns that the task needs.
Knows = Callable[[list[str]], bool]


def is_document(first: str, rest: TextIO, suffix: str) -> bool:
    """Whether a text is JSON of a form above.

    Args:
        first: its first line that is not blank, or the beginning of it.
        rest: what follows that; is read.
        suffix: of its name, in small letters.
    """
    first = first.strip("\ufeff\x00 \t\r\n")
    if first.startswith("{") and first.endswith("},"):
        first = first[:-1]  # a line that was cut out of a list
    if first.startswith("["):
        return suffix in SUFFIXES or bool(_LIST.match(first))
    if not first.startswith("{") or not (suffix in SUFFIXES or re.match(r'\{\s*("|$)', first)):
        return False
    try:
        whole = isinstance(json.loads(first, strict=False), dict)
    except (ValueError, RecursionError):
        if len(first) > MAX_LINE // 2:
            return True
        if first.startswith("{'"):
            return False  # Python's
        following = next((line for line in rest if line.strip()), "")
        return not following.startswith("{")  # else it is a line with an error in it, for json_objects to name
    return whole and not any(line.strip() for line in rest)


def document_rows(file: TextIO, path: Path, knows: Knows) -> Iterator[tuple[int, Item]]:
    """`(line, object)` of every row.

    Raises:
        UserError: it is not JSON, or holds no rows, or several lists of them.
    """
    text = _Text(file, path)
    number, is_empty = 0, True
    while sign := text.sign():
        line, number = text.line, number + 1
        if sign == "[":
            for found in _rows_of_list(text, path, knows):
                is_empty = False
                yield found
            continue
        item = text.value(WHOLE)
        if not isinstance(item, dict):
            raise text.is_no_json()
        rows = _unwrapped(item, path, knows) if number == 1 and not text.sign() else [item]
        for row in filter(None, rows):
            is_empty = False
            yield line, row
    if is_empty:
        raise UserError(f"{path} has no rows: its JSON is empty")


class _Text:
    """JSON values, decoded one after another.

    Attributes:
        line: where the next value begins, once `sign` has found it.
    """

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at, self._counted, self._is_whole = "", 0, 0, False
        self.line = 1

    def sign(self) -> str:
        """The next character that is no space, left in place; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more(CHUNK):
                break
        self._count()
        return self._text[self._at : self._at + 1]

    def take(self) -> str:
        sign = self.sign()
        self._at += len(sign)
        return sign

    def value(self, most: int) -> Any:
        """The value that begins here, of `most` characters."""
        chunk = CHUNK
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more(chunk):  # else a number may go on
                    self._at = end
                    return found
                continue
            except RecursionError:
                raise self.is_no_json() from None
            except ValueError:
                if len(self._text) - self._at > most:
                    raise UserError(
                        f"{self._path}, line {self.line}: a JSON value of over {most:,} characters, or one that is "
                        f"damaged. Write one object a line: jq -c '.[]' {self._path.name} > rows.jsonl"
                    ) from None
                if not self._more(chunk):
                    raise self.is_no_json() from None
            chunk *= 2

    def _more(self, size: int) -> bool:
        """Read on. Returns whether there was more."""
        self._count()
        read = self._file.read(size)
        self._text, self._counted, self._at = self._text[self._at :] + read, 0, 0
        return bool(read)

    def _count(self) -> None:
        self.line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at

    def is_no_json(self) -> UserError:
        shown = " ".join(self._text[self._at : self._at + 60].split())
        return UserError(f"{self._path}, line {self.line} is not a JSON object: {shown}...")


def _rows_of_list(text: _Text, path: Path, knows: Knows) -> Iterator[tuple[int, Item]]:
    text.take()
    names: list[str] = []
    dialogue: list[Any] = []
    line = text.line
    while (sign := text.sign()) not in ("]", ""):
        line = text.line
        item = text.value(LONGEST)
        if isinstance(item, dict) and (dialogue or (not names and is_message(item))):
            dialogue.append(item)
        elif isinstance(item, dict):
            yield line, item
        elif isinstance(item, list):
            row, names = _row_of_cells(item, names, knows)
            if row:
                yield line, row
        else:
            raise UserError(f"{path}, line {line} is not a JSON object: {json.dumps(item, ensure_ascii=False)[:60]}")
        if text.sign() == ",":
            text.take()
        elif text.sign() not in ("]", ""):
            raise text.is_no_json()
    if not sign:
        raise UserError(f"{path} ends within its list of rows, after line {line}: it was cut")
    text.take()
    if dialogue:
        yield line, {"messages": dialogue}


def _row_of_cells(cells: list[Any], names: list[str], knows: Knows) -> tuple[Item, list[str]]:
    """The row in a list, empty where it is the header, and the names of the cells from then on."""
    if _is_made_of(dict, cells):
        return {"messages": cells}, names
    if not names and knows([str(name) for name in cells]):
        return {}, [str(name) for name in cells]
    names = names or [f"column {number}" for number in range(1, len(cells) + 1)]
    return dict(zip(names, cells, strict=False)), names


def is_message(item: Mapping[str, Any]) -> bool:
    """Whether an object is a message of a dialogue rather than a row."""
    speaks, says = ("role", "from", "author"), ("content", "value", "parts", "tool_calls")
    return any(name in item for name in speaks) and any(name in item for name in says)


def _unwrapped(item: Item, path: Path, knows: Knows) -> list[Item]:
    """The rows of the table that is in an object, or the object if it is a row."""
    values = list(item.values())
    if any(isinstance(value, list) and value and _is_dialogue(value) for value in values):
        return [item]
    columns, data = item.get("columns"), item.get("data")
    if isinstance(columns, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(map(str, columns), row, strict=False)) for row in data]
    lists = {name: value for name, value in item.items() if _is_made_of(dict, value) and name not in _DESCRIPTIONS}
    if len(lists) > 1 and not (len(lists) == len(values) and knows(list(item))):
        first = next(iter(lists))
        listed = ", ".join(f"{name} ({len(rows):,})" for name, rows in lists.items())
        raise UserError(
            f"{path} holds several lists of rows: {listed}. Write one of them to a file: "
            f"jq -c '.\"{first}\"[]' {path.name} > {first}.jsonl"
        )
    if len(lists) == 1:
        (rows,) = lists.values()
        wrapped = all(isinstance(row.get("row"), dict) and "row_idx" in row for row in rows)  # the hub's rows API
        return [row["row"] for row in rows] if wrapped else rows
    tables = [value for value in values if _is_made_of(list, value)]
    if len(tables) == 1 and not knows(list(item)):
        rows, names = list[Item](), list[str]()
        for cells in tables[0]:
            row, names = _row_of_cells(cells, names, knows)
            rows.append(row)
        return rows
    if values and all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1:
        return [dict(zip(item, row, strict=True)) for row in zip(*values, strict=True)]
    if values and all(isinstance(value, dict) and value for value in values):
        (first, *others) = values
        if not others and not all(map(str.isdigit, first)) and any(isinstance(v, dict | list) for v in first.values()):
            return _unwrapped(first, path, knows)
        return _of_objects(item, knows)
    if len(item) >= MANY and all(isinstance(value, str | int | float) for value in values) and not knows(list(item)):
        return [{"key": name, "value": value} for name, value in item.items()]
    return [item]


def _is_made_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, kind) for part in value)


def _is_dialogue(value: list[Any]) -> bool:
    return all(isinstance(part, dict) and is_message(part) for part in value)


def _of_objects(item: dict[str, Item], knows: Knows) -> list[Item]:
    """An object of objects: columns by the number of the row, or rows by their number or name."""
    inner = list(dict.fromkeys(name for value in item.values() for name in value))
    are_columns = knows(list(item)) or (
        not knows(inner) and (all(name.isdigit() for name in inner) or len(inner) > len(item))
    )
    if are_columns and not all(name.isdigit() for name in item):
        return [{name: column.get(number) for name, column in item.items()} for number in inner]
    are_numbers = all(name.isdigit() for name in item)
    return [row if are_numbers else {"key": name, **row} for name, row in item.items()]
