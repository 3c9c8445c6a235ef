"""The apostrophe that keeps a spreadsheet from running a cell as a formula: put on where a CSV may be opened in one,
taken off where a CSV is read, so that `-maxxing` is learned as it was written.

`read_cell(spreadsheet_cell(text)) == read_cell(plain_cell(text)) == text` for every text.
"""

import re

_FORMULA = re.compile(r"[=+\-@\t\r]")  # a spreadsheet takes a cell that begins with one of these for a formula
_GUARDED = re.compile(r"'+[=+\-@\t\r]")


def spreadsheet_cell(text: str) -> str:
    """`text` as the cell of a CSV that may be opened in a spreadsheet."""
    return f"'{text}" if _FORMULA.match(text) else plain_cell(text)


def plain_cell(text: str) -> str:
    """`text` as the cell of a CSV that programs alone read: only an apostrophe of its own would be mistaken."""
    return f"'{text}" if _GUARDED.match(text) else text


def read_cell(cell: str) -> str:
    """The text in a cell of a CSV, whichever of the two wrote it."""
    return cell[1:] if _GUARDED.match(cell) else cell
