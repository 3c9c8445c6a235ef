"""Whether a term is new: the one definition that the report, the gate and the website go by.

A new term has one to four words, is no known slang, has more than the words of its question, and is neither an English
word nor a common English phrase. What cannot be told from a list is not called new: a common word stays a known one
even where its meaning is new ("drip"), so that what is called new should be new to a reader, and some new terms are not
called so.

Known slang is a list that data preparation makes of all rows and of the task's own table (`write_known`), and that each
run keeps beside its adapter. English words and how common they are come from wordfreq (Speer, 2022; its texts end in
2021), pairs of words from the bigrams of symspellpy (SymSpell's dictionary, from Google Books and the web). Neither
asks the network.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from core.files import write_whole
from data_prep.clean_text import key_of

FILE = "known_slang.txt"  # in a data folder and in the folders of its runs: a term a line
SHIPPED = Path(__file__).with_name("slang.csv")
MOST_WORDS, LONGEST = 4, 40
SPELLING = (
    80  # RapidFuzz's ratio of two keys from which one spells the other, as in data preparation: LOL, LOLZ have 86
)
RARE = 1.0  # Zipf frequency of wordfreq's rarest words: one in 100 million
WELL_KNOWN = 3.0  # one in a million: a word whose forms are known with it
# One in 100,000. Of the phrases of such words alone that were read in a run of the default settings, half were known
# ("cheat day", "beach day") and half were not ("fridge ghost"): none is called new.
EVERYDAY = 4.0
GRAMMAR = 6.0  # one in 1,000: articles, pronouns, forms of to be; "the bard" is the word "bard"
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*['’]?")
_NO_TERM = re.compile(r"[.?!:;,]\s|[:;<>|=\\\[\]{}*#]|\n|^[^\w'\"(@&+$]*$")
_ENDINGS = ("e", "es", "d", "ed", "r", "er", "in", "in'", "ing", "y", "ly", "n")


def write_known(folder: Path, splits: Iterable[str]) -> str:
    """Write the list of known slang into a data folder, from its rows in all splits and from those that were left out,
    which are known by their keys; and from the task's own table. Returns the name of the file."""

    def terms() -> Iterator[str]:
        with SHIPPED.open(encoding="utf-8", newline="") as shipped:
            yield from (row["Slang"] for row in csv.DictReader(shipped))
        for file, field in [*((f"{split}.jsonl", "slang") for split in splits), ("dropped.jsonl", "key")]:
            with (folder / file).open(encoding="utf-8") as lines:
                yield from (json.loads(line).get(field) or "" for line in lines)

    write_whole(folder / FILE, "".join(f"{term}\n" for term in terms() if term.strip()))
    return FILE


def load_lists() -> None:
    """Read the lists of English, which takes a second, before somebody waits for it."""
    _frequency("word")
    _bigrams()


class Novelty:
    """Tells new terms from others.

    Args:
        known: terms of known slang, in any spelling.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self._known = {key_of(term) for term in known} - {""}

    @classmethod
    def read(cls, folder: Path) -> "Novelty":
        """By the list in a folder of data or of a run. Raises FileNotFoundError where it has none."""
        return cls((folder / FILE).read_text(encoding="utf-8").split("\n"))

    def why_not(self, term: str, asked: str) -> str:
        """Why `term` is not new, in words that follow "not new:"; "" if it is.

        Args:
            term: as the model gave it.
            asked: all that the model was asked, its scene and condition.
        """
        words = [word.casefold().replace("’", "'") for word in _WORD.findall(term)]
        letters = any(letter.isalpha() for letter in term)
        if not 1 <= len(words) <= MOST_WORDS or not letters or len(term) > LONGEST or _NO_TERM.search(term):
            return "no term of one to four words"
        if self._is_known(key_of(term)):
            return "known slang"
        telling = list(dict.fromkeys(word for word in words if _frequency(word) < GRAMMAR)) or words[:1]
        if _is_from(telling, asked):
            return "words of the question"
        return _in_english(words) or _in_english(telling)

    def _is_known(self, key: str) -> bool:
        from rapidfuzz import fuzz, process

        return process.extractOne(key, self._known, scorer=fuzz.ratio, score_cutoff=SPELLING) is not None


def _is_from(words: list[str], asked: str) -> bool:
    """Whether each word, or all of them written as one, stands in the question, in whatever form."""
    theirs = [word.casefold().replace("’", "'") for word in _WORD.findall(asked)]
    forms = {form for word in theirs for form in _stems(word)}
    if all(_stems(word) & forms for word in words):
        return True
    runs = {"".join(theirs[at : at + length]) for length in range(2, MOST_WORDS + 1) for at in range(len(theirs))}
    return "".join(words) in runs


@cache
def _stems(word: str) -> frozenset[str]:
    """The word without each ending that it may have, where three letters are left: swimmers → swimmer, swimm, swim."""
    stems = {word, word.removesuffix("s")}
    stems |= {
        one.removesuffix(end) for one in stems for end in _ENDINGS if one.endswith(end) and len(one) > 2 + len(end)
    }
    stems |= {stem[:-1] for stem in stems if len(stem) > 3 and stem[-1] == stem[-2]}
    stems |= {stem[:-1] + "y" for stem in stems if len(stem) > 3 and stem[-1] == "i"}
    return frozenset(stems)


def _in_english(words: list[str]) -> str:
    if len(words) > 1:
        if _frequency("".join(words)) >= RARE or _is_phrase(words):
            return "a common phrase"
        return "everyday words" if all(_frequency(word) >= EVERYDAY for word in words) else ""
    (word,) = words
    if _frequency(word) >= RARE:
        return "already a word"
    if any(_frequency(stem) >= WELL_KNOWN for stem in _stems(word)):
        return "a form of a word"
    # Two words written as one are judged as two.
    return next(filter(None, (_in_english([word[:at], word[at:]]) for at in range(3, len(word) - 2))), "")


def _is_phrase(words: list[str]) -> bool:
    return all(f"{one} {other}" in _bigrams() for one, other in pairwise(words))


def _frequency(word: str) -> float:
    """Zipf frequency: the logarithm of how often the word occurs in a billion; 0 for a word that wordfreq lacks."""
    from wordfreq import zipf_frequency

    return zipf_frequency(word, "en", wordlist="large")


@cache
def _bigrams() -> frozenset[str]:
    from importlib.resources import files

    from symspellpy import SymSpell

    speller = SymSpell()
    file = str(files("symspellpy") / "frequency_bigramdictionary_en_243_342.txt")
    speller.load_bigram_dictionary(file, term_index=0, count_index=2)
    return frozenset(speller.bigrams)
