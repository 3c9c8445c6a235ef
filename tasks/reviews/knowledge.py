"""What reviewers say, from their reviews: which aspects they praise and criticise, how often, in which words.

Every count is of reviews and every quote is a piece of one, so whatever is said from this knowledge can be looked up.
A review is cut into sentences and these into clauses, so that "great acting but an awful ending" praises one thing and
criticises another. Words say which aspect a clause is about (film_words.yaml and the task) and VADER (Hutto and
Gilbert, 2014; Gilbert's word list with that of film reviews) how. VADER knows English: of reviews in other languages
only the rating is used. Everything runs from what lies in the packages, and the same reviews give the same knowledge.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import yaml
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from sentencex import segment
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer, TfidfVectorizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from data_prep.clean_text import is_explicit
from tasks.reviews.aspect_words import FILM_WORDS, AspectWords

OPINION = 0.2  # of VADER's -1 to 1, for a clause: one good word has 0.4, a weak one less
STRONG = 2 * OPINION  # leaves no doubt, and is quoted rather than what is weaker
SHARING = 4  # words, at most, of a part that shares the judgement of another: "The story, the acting and ..."
TONE = -0.15, 0.15  # the mean of a review's sentences: negative up to the first, positive from the second
RATING = 0.5, 0.7  # the same for ratings: two stars of five and four, five of ten and seven
SURE = 0.5  # probability of a language; below it a review with a word of VADER's counts as English
QUOTE = range(4, 31)  # words: less says nothing, more is an essay
REPRESENTATIVE, PHRASES = 30, 12
LANGUAGES = {
    "en": "English",
    "es": "Spanish",
    "pt": "Portuguese",
    "fr": "French",
    "de": "German",
    "it": "Italian",
    "nl": "Dutch",
    "sv": "Swedish",
    "da": "Danish",
    "no": "Norwegian",
    "fi": "Finnish",
    "pl": "Polish",
    "cs": "Czech",
    "hu": "Hungarian",
    "ro": "Romanian",
    "el": "Greek",
    "tr": "Turkish",
    "ru": "Russian",
    "uk": "Ukrainian",
    "ar": "Arabic",
    "he": "Hebrew",
    "fa": "Persian",
    "hi": "Hindi",
    "bn": "Bengali",
    "ur": "Urdu",
    "id": "Indonesian",
    "tl": "Tagalog",
    "vi": "Vietnamese",
    "th": "Thai",
    "ko": "Korean",
    "ja": "Japanese",
    "zh": "Chinese",
}
UNKNOWN = "unknown"

# Where a sentence may change its mind: what stands on both sides is judged apart.
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


class Opinion(NamedTuple):
    """What one review says of an aspect in one place.

    Attributes:
        review: the number of its row in the source.
        score: from -1 to 1, never 0.
        quote: where it says so, as it stands in the review; "" where that does not read well alone.
    """

    review: int
    aspect: str
    score: float
    quote: str


@dataclass(frozen=True)
class Review:
    """A review as it was understood.

    Attributes:
        row: its number in the source.
        language: an ISO 639-1 code of `LANGUAGES`, or `UNKNOWN`.
        tone: how positive its words are, from -1 to 1; None where none judges, or none is English.
        rating: from 0 to 1, None without one.
        mentions: the aspects that it names, with a judgement or without.
        sentences: those that can be quoted.
        judgements: those of them that leave no doubt.
    """

    row: int
    text: str
    language: str
    tone: float | None
    rating: float | None = None
    mentions: frozenset[str] = frozenset()
    opinions: tuple[Opinion, ...] = ()
    sentences: tuple[str, ...] = ()
    judgements: tuple[str, ...] = ()

    @property
    def verdict(self) -> str | None:
        """positive, mixed or negative: by the rating where there is one, else by the words; None without either."""
        value, (low, high) = (self.tone, TONE) if self.rating is None else (self.rating, RATING)
        if value is None:
            return None
        return "positive" if value >= high else "negative" if value <= low else "mixed"


@dataclass
class Aspect:
    """What a set of reviews says of one aspect; review numbers, each in one of the first three lists at most."""

    name: str
    favourable: list[int] = field(default_factory=list)
    unfavourable: list[int] = field(default_factory=list)
    both: list[int] = field(default_factory=list)
    mentions: list[int] = field(default_factory=list)
    praise: list[Opinion] = field(default_factory=list)  # that can be quoted, the strongest first
    criticism: list[Opinion] = field(default_factory=list)

    @property
    def praised_by(self) -> list[int]:
        return sorted([*self.favourable, *self.both])

    @property
    def criticised_by(self) -> list[int]:
        return sorted([*self.unfavourable, *self.both])

    @property
    def judged(self) -> list[int]:
        return sorted([*self.favourable, *self.unfavourable, *self.both])


# --- one review -----------------------------------------------------------------------------------------------


class ReviewReader:
    """Understands reviews of the film `title`, with the usual aspects and those of the task.

    Args:
        aspects: name → words, added to those of film_words.yaml or in their place; no words leave an aspect out.
    """

    def __init__(self, title: str, aspects: Mapping[str, Sequence[str]]) -> None:
        self._words = AspectWords(title, aspects)
        self.aspects = self._words.names
        known = yaml.safe_load(FILM_WORDS.read_text(encoding="utf-8"))
        self._phrases = [(re.compile(rf"\b(?:{text})", re.I), word) for text, word in known["words"]["phrases"].items()]
        self._vader = SentimentIntensityAnalyzer()
        for word in known["words"]["neutral"]:
            self._vader.lexicon.pop(word, None)
        self._vader.lexicon.update(known["words"]["rated"])

    def read(self, row: int, text: str, rating: float | None = None, headline: str = "") -> Review:
        """Args: `text` and `headline` as cleaned by clean_text; `rating` from 0 to 1."""
        language = self._language(text)
        if language != "en":
            return Review(row, text, language, None, rating)
        sentences = _sentences(text)
        scores = [self.score(sentence) for sentence in sentences]
        tones = [tone for tone in [*scores, self.score(headline)] if tone]
        mentions = frozenset(self._words.find(text))
        opinions = tuple(opinion for sentence in sentences for opinion in self._opinions(row, sentence))
        quotable = [
            (sentence, score) for sentence, score in zip(sentences, scores, strict=True) if _reads_well(sentence)
        ]
        strong = tuple(sentence for sentence, score in quotable if abs(score) >= STRONG)
        tone = sum(tones) / len(tones) if tones else None
        return Review(
            row, text, language, tone, rating, mentions, opinions, tuple(sentence for sentence, _ in quotable), strong
        )

    def score(self, text: str) -> float:
        """How positive an English text is, from -1 to 1."""
        text = self._words.without_title(text)
        for phrase, word in self._phrases:
            text = phrase.sub(f" {word} ", text)
        return float(self._vader.polarity_scores(text)["compound"])

    def _language(self, text: str) -> str:
        words = _WORD.findall(text.casefold())
        if not words:
            return UNKNOWN
        language, probability = _identifier().classify(text)
        if probability < SURE:
            # Names and slang mislead over a few words: "Craptacular" is no Romanian.
            known = language == "en" or any(word in self._vader.lexicon or word in self._words for word in words)
            return "en" if known else UNKNOWN
        return str(language)

    def _opinions(self, row: int, sentence: str) -> list[Opinion]:
        found: dict[tuple[str, bool], Opinion] = {}
        clauses = [(clause, _cut(clause, _PART)) for clause in _cut(sentence, _TURN)]
        scored = [[self.score(part) for part in parts] for _, parts in clauses]
        for (clause, parts), scores in zip(clauses, scored, strict=True):
            for place, part in enumerate(parts):
                named = self._words.find(part)
                # "The story, the acting and the music are great": a short part without a judgement shares the next's.
                near = [*scores[place:], *reversed(scores[:place])] if len(part.split()) <= SHARING else [scores[place]]
                score = next((score for score in near if score), 0.0)
                if not named or abs(score) < OPINION:
                    continue
                # Quoted is what takes one side only: the sentence where all of it does, else the clause.
                around = ((sentence, chain(*scored)), (clause, scores))
                one_sided = [_JOINT.sub("", text) for text, tones in around if all(tone * score >= 0 for tone in tones)]
                quote = next(filter(_reads_well, one_sided), "")
                for name in named:
                    found.setdefault((name, score > 0), Opinion(row, name, score, quote))
        return list(found.values())


@cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(LANGUAGES))
    return identifier


def _sentences(text: str) -> list[str]:
    return [part.strip() for sentence in segment("en", text) for part in _UNSPACED.split(sentence) if part.strip()]


def _cut(text: str, where: re.Pattern[str]) -> list[str]:
    cuts = [(0, 0), *(match.span() for match in where.finditer(text)), (len(text), len(text))]
    return [text[end:start] for (_, end), (start, _) in pairwise(cuts) if text[end:start].strip()]


def _reads_well(text: str) -> bool:
    """Whether a stranger could be shown it: a thought long enough, not shouted, not cut off, without explicit terms."""
    words = _WORD.findall(text)
    return (
        len(words) in QUOTE
        and not text.isupper()
        and text.count('"') % 2 == 0
        and text.count("(") == text.count(")")
        and "http" not in text
        and not is_explicit(text)
    )


# --- many reviews ---------------------------------------------------------------------------------------------


@dataclass
class Knowledge:
    """What a set of reviews says as a whole.

    Attributes:
        aspects: those named at all, the most discussed first.
        representative: (sentence, review): judgements nearest to all that are made, each unlike those before it.
        phrases: (phrase, the reviews that hold it).
        scale: the best rating there is, such as 5 stars.
    """

    reviews: list[Review]
    aspects: list[Aspect]
    representative: list[tuple[str, int]]
    phrases: list[tuple[str, list[int]]]
    scale: int

    @classmethod
    def of(cls, reviews: Sequence[Review], title: str, scale: int) -> "Knowledge":
        by_name: dict[str, Aspect] = {}
        for review in reviews:
            sides: dict[str, set[bool]] = defaultdict(set)
            for name in sorted(review.mentions):
                by_name.setdefault(name, Aspect(name)).mentions.append(review.row)
            for opinion in review.opinions:
                aspect, good = by_name[opinion.aspect], opinion.score > 0
                sides[opinion.aspect].add(good)
                if opinion.quote:
                    (aspect.praise if good else aspect.criticism).append(opinion)
            for name, said in sides.items():
                aspect = by_name[name]
                (aspect.both if len(said) > 1 else aspect.favourable if True in said else aspect.unfavourable).append(
                    review.row
                )
        for aspect in by_name.values():
            for opinions in (aspect.praise, aspect.criticism):
                opinions.sort(key=lambda opinion: (-abs(opinion.score), opinion.review))
        aspects = sorted(by_name.values(), key=lambda aspect: (-len(aspect.judged), -len(aspect.mentions), aspect.name))
        return cls(list(reviews), aspects, _representative(reviews), _phrases(reviews, title), scale)

    def verdicts(self) -> dict[str, list[int]]:
        """positive, mixed and negative → reviews."""
        found: dict[str, list[int]] = {"positive": [], "mixed": [], "negative": []}
        for review in self.reviews:
            if review.verdict:
                found[review.verdict].append(review.row)
        return found

    def languages(self) -> dict[str, list[int]]:
        """Language → reviews, the commonest first."""
        found: dict[str, list[int]] = defaultdict(list)
        for review in self.reviews:
            found[LANGUAGES.get(review.language, UNKNOWN)].append(review.row)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def mean_rating(self) -> tuple[float, list[int]] | None:
        """From 0 to 1, and the reviews that have one."""
        rated = {review.row: review.rating for review in self.reviews if review.rating is not None}
        return (sum(rated.values()) / len(rated), list(rated)) if rated else None

    def praised(self) -> list[Aspect]:
        """The aspects with most and clearest praise first: n² / judged, for n reviews that praise."""
        return _ranked(self.aspects, lambda aspect: len(aspect.praised_by))

    def criticised(self) -> list[Aspect]:
        return _ranked(self.aspects, lambda aspect: len(aspect.criticised_by))

    def as_json(self, split_of: Mapping[int, str]) -> dict[str, Any]:
        """What knowledge.json holds: the counts, and five quotes of each side with their review and its split."""

        def quotes(opinions: Sequence[Opinion]) -> list[dict[str, Any]]:
            return [{"quote": o.quote, "review": o.review, "split": split_of[o.review]} for o in opinions[:5]]

        rating = self.mean_rating()
        return {
            "reviews": len(self.reviews),
            "languages": {name: len(rows) for name, rows in self.languages().items()},
            "verdicts": {name: len(rows) for name, rows in self.verdicts().items()},
            "rating": {"mean": round(self.scale * rating[0], 2), "of": self.scale, "reviews": len(rating[1])}
            if rating
            else None,
            "aspects": [
                {
                    "name": aspect.name,
                    "mentions": len(aspect.mentions),
                    "favourable": len(aspect.favourable),
                    "unfavourable": len(aspect.unfavourable),
                    "both": len(aspect.both),
                    "praise": quotes(aspect.praise),
                    "criticism": quotes(aspect.criticism),
                }
                for aspect in self.aspects
            ],
            "phrases": {phrase: len(rows) for phrase, rows in self.phrases},
            "representative": [
                {"quote": quote, "review": row, "split": split_of[row]} for quote, row in self.representative
            ],
        }


def _ranked(aspects: Sequence[Aspect], count: Callable[[Aspect], int]) -> list[Aspect]:
    ranked = sorted(aspects, key=lambda aspect: -(count(aspect) ** 2) / max(len(aspect.judged), 1))
    return [aspect for aspect in ranked if count(aspect)]


def _representative(reviews: Sequence[Review]) -> list[tuple[str, int]]:
    """Sentences near the centroid of all in TF-IDF, by maximal marginal relevance (Carbonell and Goldstein, 1998)."""
    said = [(sentence, review.row) for review in reviews for sentence in review.judgements]
    try:
        vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit_transform([text for text, _ in said])
    except ValueError:  # no words but stop words
        return said[:REPRESENTATIVE]
    centre = np.asarray(vectors.mean(axis=0)).ravel()
    relevance = vectors @ (centre / np.linalg.norm(centre))
    alike, chosen = np.zeros(len(said)), list[int]()
    for _ in range(min(REPRESENTATIVE, len(said))):
        best = int(np.argmax(np.where(alike >= 2, -np.inf, relevance - alike)))
        chosen.append(best)
        alike = np.maximum(alike, (vectors @ vectors[best].T).toarray().ravel())
        alike[best] = 2  # taken
    return [said[place] for place in chosen]


def _phrases(reviews: Sequence[Review], title: str) -> list[tuple[str, list[int]]]:
    """Two to four words, between words that say something, that at least three reviews have in common."""
    english = [review for review in reviews if review.language == "en"]
    vectorizer = CountVectorizer(ngram_range=(2, 4), binary=True, token_pattern=r"(?u)\b\w[\w'-]*\b")
    try:
        counts = vectorizer.fit_transform([review.text for review in english]).tocsc()
    except ValueError:  # no review has two words
        return []
    names, totals = vectorizer.get_feature_names_out(), np.asarray(counts.sum(axis=0)).ravel()
    mine = set(title.casefold().split())
    order = sorted(
        np.flatnonzero(totals >= 3), key=lambda place: (-totals[place] * len(names[place].split()), names[place])
    )
    chosen: list[tuple[str, list[int]]] = []
    for place in order:
        words = names[place].split()
        if (
            {words[0], words[-1]} & ENGLISH_STOP_WORDS
            or mine & set(words)
            or any(names[place] in p or p in names[place] for p, _ in chosen)
        ):
            continue
        chosen.append((names[place], [english[row].row for row in counts[:, [place]].nonzero()[0]]))
        if len(chosen) == PHRASES:
            break
    return chosen


def languages_of(reviews: Iterable[Review]) -> str:
    """`"Spanish 40, French 2"`, for messages."""
    found = Counter(LANGUAGES.get(review.language, UNKNOWN) for review in reviews)
    return ", ".join(f"{name} {count}" for name, count in found.most_common())
