"""Reads reviews: which aspects each praises and criticises, in which words, and what it comes to.

A review is cut into sentences and these into clauses, so that "superb acting, but the ending is awful" praises one
thing and criticises another. Words decide which aspect a clause is about (aspect_words.py), and a model what it says
of it (opinions.py): praise, criticism, or nothing that could be told. What cannot be told is not counted.

English is read. Of reviews in other languages just the rating is used, and they are counted by name. All data comes
with the installed packages, and the same reviews give the same result on the same machine.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

from sentencex import segment

from data_prep.clean_text import is_explicit
from tasks.reviews.aspect_words import AspectWords
from tasks.reviews.languages import language_of
from tasks.reviews.opinions import Say
from tasks.reviews.verdicts import verdict_of

RATING = 0.5, 0.7  # negative up to the first, positive from the second
QUOTE = range(4, 31)  # words in a quote: fewer say nothing, more are too long to read
SHARING = 4  # words at most in a part that is judged with the others: "The story, the acting and ..."

# Where the sentiment of a sentence may change: both sides are scored separately.
_TURN = re.compile(
    r",?\s+(?=(?:but|however|although|though|yet|whereas|while|despite|except|unfortunately|sadly|until)\b)"
    r"|[;:]\s+|\s+[-–—]+\s+|…\s*|\.{2,}\s*",
    re.IGNORECASE,
)
_PART = re.compile(r",\s+|\s+(?=and\b)", re.IGNORECASE)
_UNSPACED = re.compile(r"(?<=[a-z)][.!?])(?=[A-Z][a-z])")  # "Great story.A lot to enjoy."
_JOINT = re.compile(
    r"^(?:but|and|or|so|yet|however|although|though|whereas|while|except|until)\b,?\s*|[\s,]+$", re.IGNORECASE
)
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


class RawReview(NamedTuple):
    """A review as the table has it: cleaned, on one line; `rating` from 0 to 1."""

    row: int
    text: str
    rating: float | None = None
    headline: str = ""


class Opinion(NamedTuple):
    """What a review says about an aspect in one place.

    Attributes:
        review: its row number in the source.
        is_praise: or else it is criticism.
        certainty: the probability of that.
        quote: the excerpt that says so, verbatim; "" if it does not read well on its own.
    """

    review: int
    aspect: str
    is_praise: bool
    certainty: float
    quote: str


@dataclass(frozen=True)
class Review:
    """A review and what was extracted from it.

    Attributes:
        row: its number in the source.
        language: an ISO 639-1 code of `LANGUAGES`, or `UNKNOWN`.
        said: positive, mixed or negative by its words; None if they do not tell, or it is not English.
        rating: from 0 to 1, None without one.
        mentions: the aspects that it names, with or without an opinion.
        sentences: sentences that can be quoted.
        judgements: those of them that praise or criticise.
    """

    row: int
    text: str
    language: str
    said: str | None = None
    rating: float | None = None
    mentions: frozenset[str] = frozenset()
    opinions: tuple[Opinion, ...] = ()
    sentences: tuple[str, ...] = ()
    judgements: tuple[str, ...] = ()

    @property
    def verdict(self) -> str | None:
        """positive, mixed or negative: by the rating if there is one, else by the words; None without either."""
        if self.rating is None:
            return self.said
        low, high = RATING
        return "positive" if self.rating >= high else "negative" if self.rating <= low else "mixed"


class ReviewReader:
    """Reads reviews.

    Args:
        words: of the aspects.
        judge: tells praise from criticism, such as `Opinions().read`; None: only aspects and languages are read.
        verdict: of a review, by what `parts_of` it say.
    """

    def __init__(
        self,
        words: AspectWords,
        judge: Callable[[Sequence[str]], list[Say]] | None,
        verdict: Callable[[Sequence[Say]], str | None] = verdict_of,
    ) -> None:
        self.words, self._judge, self._verdict = words, judge, verdict

    def read(self, reviews: Sequence[RawReview]) -> list[Review]:
        """All reviews, in their order. The sentences of all are judged together, which takes a few ms each."""
        parsed = [_Parsed(review, language_of(review.text), self.words) for review in reviews]
        texts = dict.fromkeys(text for review in parsed for text in review.to_judge())
        said = self._judge(list(texts)) if self._judge else []
        heard = dict(zip(texts, said, strict=False))
        return [review.understood(heard, self._verdict) for review in parsed]


class _Parsed:
    """A review cut into what is judged: its headline, its sentences and, where these name aspects, their clauses."""

    def __init__(self, review: RawReview, language: str, words: AspectWords) -> None:
        self._review, self._language, self._words = review, language, words
        english = language == "en"
        self._sentences = sentences_of(review.text) if english else []
        self._clauses = {
            sentence: _clauses(sentence) if words.find(sentence) else [sentence] for sentence in self._sentences
        }

    def to_judge(self) -> list[str]:
        if self._language != "en":
            return []
        clauses = (clause for some in self._clauses.values() for clause in some)
        return [*self._parts(), *self._sentences, *clauses]

    def _parts(self) -> list[str]:
        """What the verdict is read from."""
        return [*filter(None, [self._review.headline]), *parts_of(self._sentences)]

    def understood(self, heard: Mapping[str, Say], verdict: Callable[[Sequence[Say]], str | None]) -> Review:
        row, text, rating, _ = self._review
        if self._language != "en":
            return Review(row, text, self._language, rating=rating)
        quotable = [sentence for sentence in self._sentences if reads_well(sentence)]
        return Review(
            row,
            text,
            self._language,
            verdict([heard[part] for part in self._parts()]) if heard else None,
            rating,
            frozenset(self._words.find(text)),
            tuple(chain.from_iterable(self._opinions(sentence, heard) for sentence in self._sentences)),
            tuple(quotable),
            tuple(sentence for sentence in quotable if sentence in heard and heard[sentence].side),
        )

    def _opinions(self, sentence: str, heard: Mapping[str, Say]) -> list[Opinion]:
        """What a sentence says of the aspects that it names: what the clause that names one does, unless the whole
        sentence says the opposite."""
        found: dict[str, Opinion] = {}
        unclear = set[str]()
        if sentence not in heard:
            return []
        whole = heard[sentence]
        for clause in self._clauses[sentence]:
            part = heard[clause]
            for name in self._words.find(clause):
                if not part.side or part.side == -whole.side:
                    continue
                if name in found and found[name].is_praise != (part.side > 0):
                    unclear.add(name)  # both in one sentence: perhaps of two things
                # The quote must take one side only: the whole sentence if it does, else the clause.
                takes_side = all(heard[other].side in (0, part.side) for other in self._clauses[sentence])
                pieces = [sentence] if takes_side and whole.side == part.side else []
                quote = next(filter(reads_well, [*pieces, _JOINT.sub("", clause)]), "")
                found.setdefault(name, Opinion(self._review.row, name, part.side > 0, part.certainty, quote))
        return [opinion for name, opinion in found.items() if name not in unclear]


def sentences_of(text: str) -> list[str]:
    return [part.strip() for sentence in segment("en", text) for part in _UNSPACED.split(sentence) if part.strip()]


def parts_of(sentences: Sequence[str]) -> list[str]:
    """The sentences of a review, cut where what they say may turn."""
    return [part for sentence in sentences for part in _cut(sentence, _TURN)]


def _clauses(sentence: str) -> list[str]:
    """The clauses of a sentence, with short ones left where they stand: "The story, the acting and the music are ..."
    is one."""
    cut = _cut(sentence, _TURN)
    clauses: list[str] = []
    for piece in cut:
        parts = _cut(piece, _PART)
        if len(parts) > 1 and all(len(part.split()) > SHARING for part in parts):
            clauses += parts
        else:
            clauses.append(piece)
    return clauses


def _cut(text: str, where: re.Pattern[str]) -> list[str]:
    cuts = [(0, 0), *(match.span() for match in where.finditer(text)), (len(text), len(text))]
    return [text[end:start] for (_, end), (start, _) in pairwise(cuts) if text[end:start].strip()]


def reads_well(text: str) -> bool:
    """Whether a text can be quoted on its own: long enough, not all capitals, not cut off, without explicit terms."""
    words = _WORD.findall(text)
    return (
        len(words) in QUOTE
        and not text.isupper()
        and text.count('"') % 2 == 0
        and text.count("(") == text.count(")")
        and "http" not in text
        and not is_explicit(text)
    )
