"""Which rows are near-duplicates of each other, decided letter by letter by RapidFuzz.

A row is *near* another when a model trained on one has in effect seen the other:

- their whole text is nearly the same (`SAME_TEXT`), or
- their keys are nearly the same (`SAME_KEY`) and so is the rest of what the task requires (`SAME_TEXT`).

So `LOL` and `LOLZ`, both "laughing out loud", are near whatever their examples; `LOL` and `ROFL` with that one
definition are not, unless their other columns agree too; nor are `FOMO` "fear of missing out" and `JOMO` "joy of
missing out". Texts are compared without case and punctuation. Where several fields are the key together, such as an
instruction and its input, those that are equal in both rows are left out of the comparison: one long instruction for
all rows does not make them near.

Comparing every row with every other one would take days for a million rows: minhash.py and candidates.py propose which
texts to compare.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz, process

SAME_TEXT = 90  # of 100, RapidFuzz's `ratio`: two or three letters in a short line, a word in a long one
SAME_KEY = 80  # LOL and LOLZ have 86, bussin and bussing 92, FOMO and JOMO 75
SHORT = 24  # letters: a definition of one or two words
_NO_WORD = re.compile(r"[\W_]+")
_NO_WORD_ASCII = {sign: " " for sign in range(128) if not chr(sign).isalnum()}


class Wording(NamedTuple):
    """The text of a row that is compared: all its columns, and of the required ones the key and the rest.

    Where several fields are the key, `asked` has the text of each, and `whole` that of the other columns alone.
    """

    whole: str
    key: str
    rest: str
    asked: tuple[str, ...] = ()

    @classmethod
    def of(cls, cells: Sequence[str], key: str, rest: Sequence[int], asked: Sequence[int] = ()) -> "Wording":
        """`cells` are in the order of the task's columns; `asked` are the indices of the key, `rest` those of other
        required columns."""
        bare = [_bare(cell) for cell in cells]

        def joined(places: Sequence[int]) -> str:
            words = " ".join([bare[place] for place in places if bare[place]])
            return words or " ".join([cells[place] for place in places]).casefold()

        if len(asked) < 2:
            return cls(joined(range(len(cells))), key, joined(rest))
        others = [place for place in range(len(cells)) if place not in asked]
        return cls(joined(others), key, joined(rest), tuple(joined([place]) for place in asked))

    def texts(self) -> list[str]:
        """The texts that candidates are found by."""
        if self.asked:
            return list(dict.fromkeys((" ".join((*self.asked, self.whole)), " ".join((*self.asked[1:], self.whole)))))
        head = f"{self.key} {self.rest}" if self.rest else self.whole
        # `EZ easy` and `EZY easy` share half of their shingles; `easy` and `easy` all of them.
        rest = self.rest if 0 < len(self.rest) < SHORT else self.whole
        return list(dict.fromkeys((self.whole, head, rest)))


def are_near(one: Sequence[Wording], other: Sequence[Wording]) -> NDArray[np.bool_]:
    """Whether each pair `(one[i], other[i])` is near, by the rule above; shape `(len(one),)`."""
    if one and one[0].asked:
        one, other = zip(*map(_without_equals, one, other), strict=True)

    def same(field: str, threshold: int) -> NDArray[np.bool_]:
        pairs = [getattr(wording, field) for wording in one], [getattr(wording, field) for wording in other]
        return process.cpdist(*pairs, scorer=fuzz.ratio, score_cutoff=threshold, dtype=np.float32) >= threshold

    stated = np.array([bool(wording.rest) for wording in one], bool)
    return same("whole", SAME_TEXT) | (stated & same("key", SAME_KEY) & same("rest", SAME_TEXT))


def _without_equals(one: Wording, other: Wording) -> tuple[Wording, Wording]:
    """Both without the fields of their keys that are equal in them."""
    differ = [place for place, (mine, theirs) in enumerate(zip(one.asked, other.asked, strict=True)) if mine != theirs]

    def rest(wording: Wording) -> Wording:
        asked = " ".join(wording.asked[place] for place in differ)
        return wording._replace(whole=f"{asked} {wording.whole}" if asked else wording.whole, key=asked)

    return rest(one), rest(other)


def comparable(text: str) -> str:
    """Without case and punctuation: `"Bussin', fr!"` → `"bussin fr"`; a text of punctuation alone is as it was."""
    return _bare(text) or text.casefold()


def _bare(text: str) -> str:
    low = text.casefold()
    bare = low.translate(_NO_WORD_ASCII) if low.isascii() else _NO_WORD.sub(" ", low)  # five times as fast
    return " ".join(bare.split())
