"""Labelled sentences and reviews, in labelled/: what reading is fitted to, and what it is measured with.

`sentences.tsv` and `reviews.tsv` were written for this: ten domains; negation, praise by comparison, dark subjects,
words in another sense, sarcasm, plain facts. `squid_game_rows.tsv` labels sentences and rows of a public table of 897
viewer reviews, which is not part of this project, by row number and hash. One half is for development; nothing is
fitted to or chosen by the half that is held out. The halves are a hash of the text. Some more sentences, with facts and
dark subjects above all, and more reviews are there to be fitted to and belong to neither half.
"""

import csv
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.clean_text import clean
from tasks.reviews.read_reviews import sentences_of

FOLDER = Path(__file__).parent / "labelled"
HELD_OUT, DEVELOPMENT, FITTING = "held out", "development", "fitting"
_TARGET = re.compile(r"\[([^\]]*)([+0-])\]")


class Labelled(NamedTuple):
    """A text and what it says.

    Attributes:
        label: of a sentence: praise, criticism, both or neither; of a review: positive, mixed, negative or none.
        targets: (word in the text, in small letters, 1 for praise of it, -1 for criticism, 0 for neither).
    """

    text: str
    half: str
    domain: str
    label: str
    targets: tuple[tuple[str, int], ...] = ()


def sentences(half: str, squid_game: Path | None) -> list[Labelled]:
    """The labelled sentences of a half; with the table of viewer reviews also those of its."""
    own = []
    for row in _rows("sentences.tsv", half):
        marked = row["sentence"]
        targets = tuple(
            (found[1].casefold(), {"+": 1, "-": -1, "0": 0}[found[2]]) for found in _TARGET.finditer(marked)
        )
        own.append(Labelled(_TARGET.sub(r"\1", marked), half, row["domain"], row["label"], targets))
    return [*own, *_of_table("sentence", half, squid_game)]


def reviews(half: str, squid_game: Path | None) -> list[Labelled]:
    """The labelled reviews of a half, as `sentences`."""
    own = [Labelled(row["review"], half, row["domain"], row["label"]) for row in _rows("reviews.tsv", half)]
    return [*own, *_of_table("review", half, squid_game)]


def _of_table(of: str, half: str, table: Path | None) -> Iterator[Labelled]:
    if table is None:
        return
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file, skipinitialspace=True) if any(cell.strip() for cell in row)][1:]
    for row in _rows("squid_game_rows.tsv", half):
        if row["of"] != of:
            continue
        review = " ".join(clean(rows[int(row["row"]) - 1][0])[0].split())
        texts = sentences_of(review) if of == "sentence" else [review]
        text = next((text for text in texts if _hash(text).startswith(row["sha256"])), None)
        if text is not None:  # a later segmenter may cut a sentence elsewhere
            yield Labelled(text, half, "viewer reviews", row["label"])


def _rows(name: str, half: str) -> Iterator[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        yield from (row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["half"] == half)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
