"""Reads a file of plain text as rows: passages of some paragraphs, each about as long as a model reads at once.

A passage ends at the first blank line after `PASSAGE` characters, or, in a text without any, at the first line end
after twice as many. Nothing is left out, and lines stay as they are.
"""

import csv
from collections.abc import Iterator, Sequence

from data_prep.read_lines import TOO_LONG, NumberedLines

SUFFIXES = (".txt", ".text", ".md", ".rst")
PASSAGE = 1200  # characters: some 300 tokens, so that most passages are one sample of 512
LOOK = 20  # lines that show whether a .txt is a text


def is_text(lines: Sequence[str]) -> bool:
    """Whether the first lines of a .txt are a text rather than a table: they are no JSON, and no sign parts nearly all
    of them into as many cells as the first."""
    filled = [line for line in lines if line.strip()][:LOOK]
    if not filled or filled[0].lstrip()[:1] in ("{", "["):
        return False
    for sign in ",;\t|":
        widths = [len(cells) for cells in csv.reader(filled, delimiter=sign)]
        if widths[0] > 1 and widths.count(widths[0]) >= 0.8 * len(widths):
            return False
    return True


def passages(lines: NumberedLines) -> Iterator[tuple[int, str, str]]:
    """`(line, text, problem)` of every passage; one of the two is ""."""
    first, taken, size = 0, list[str](), 0
    while True:
        lines.begin()
        try:
            line = next(lines, "")
        except csv.Error:
            yield lines.number, "", TOO_LONG
            continue
        is_blank = not line.strip("\ufeff\x00 \t\r\n")
        if taken and (not line or (is_blank and size >= PASSAGE) or size >= 2 * PASSAGE):
            yield first, "".join(taken), ""
            taken, size = [], 0
        if not line:
            return
        if taken or not is_blank:
            first = first if taken else lines.number
            taken.append(line)
            size += len(line)
