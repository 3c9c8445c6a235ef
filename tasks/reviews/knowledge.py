"""Counts what a set of reviews says: which aspects they praise and criticise, how often, and in which words.

Every count is of reviews and every quote is an excerpt from one, so every statement based on it can be checked.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer, TfidfVectorizer

from tasks.reviews.find_aspects import Subject
from tasks.reviews.languages import LANGUAGES, UNKNOWN, names_of
from tasks.reviews.read_reviews import Opinion, Review

REPRESENTATIVE, PHRASES = 30, 12


@dataclass
class Aspect:
    """What a set of reviews says about one aspect. A review number is in at most one of the first three lists."""

    name: str
    favourable: list[int] = field(default_factory=list)
    unfavourable: list[int] = field(default_factory=list)
    both: list[int] = field(default_factory=list)
    mentions: list[int] = field(default_factory=list)
    praise: list[Opinion] = field(default_factory=list)  # quotable opinions, the strongest first
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


@dataclass
class Knowledge:
    """What a set of reviews says as a whole.

    Attributes:
        aspects: all that are named, the most discussed first.
        representative: (sentence, review): opinions closest to the average one, each unlike those before it.
        phrases: (phrase, the reviews that contain it).
        scale: the maximum rating, such as 5 stars.
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
                aspect, good = by_name[opinion.aspect], opinion.is_praise
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
                opinions.sort(key=lambda opinion: (-opinion.certainty, opinion.review))
        aspects = sorted(by_name.values(), key=lambda aspect: (-len(aspect.judged), -len(aspect.mentions), aspect.name))
        return cls(list(reviews), aspects, _representative(reviews), _phrases(reviews, title), scale)

    def verdicts(self) -> dict[str, list[int]]:
        """`positive`, `mixed` and `negative` → review numbers."""
        found: dict[str, list[int]] = {"positive": [], "mixed": [], "negative": []}
        for review in self.reviews:
            if review.verdict:
                found[review.verdict].append(review.row)
        return found

    def languages(self) -> dict[str, list[int]]:
        """Language → review numbers, the most common first."""
        found: dict[str, list[int]] = defaultdict(list)
        for review in self.reviews:
            found[LANGUAGES.get(review.language, UNKNOWN)].append(review.row)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def mean_rating(self) -> tuple[float, list[int]] | None:
        """The mean rating, from 0 to 1, and the reviews that have a rating."""
        rated = {review.row: review.rating for review in self.reviews if review.rating is not None}
        return (sum(rated.values()) / len(rated), list(rated)) if rated else None

    def praised(self) -> list[Aspect]:
        """Aspects ranked by amount and clarity of praise: n² / judged, for n reviews that praise."""
        return _ranked(self.aspects, lambda aspect: len(aspect.praised_by))

    def criticised(self) -> list[Aspect]:
        return _ranked(self.aspects, lambda aspect: len(aspect.criticised_by))

    def as_json(self, split_of: Mapping[int, str]) -> dict[str, Any]:
        """The contents of knowledge.json: counts, and five quotes per side with their review and its split."""

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
    """Sentences near the TF-IDF centroid, chosen by maximal marginal relevance (Carbonell and Goldstein, 1998)."""
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
    """Phrases of two to four words, not beginning or ending in a stop word, that at least three reviews share."""
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


def told(reviews: Sequence[Review], subject: Subject) -> list[str]:
    """Sentences about what was read and what was not, for whoever prepares the reviews."""
    english = [review for review in reviews if review.language == "en"]
    covered = [review for review in english if review.mentions]
    lines = []
    if others := [review.language for review in reviews if review.language != "en"]:
        lines.append(f"Left out, as only English is read (ratings count): {names_of(others)} of {len(reviews)}")
    if subject.new:
        lines.append(f"Aspects found in the reviews: {', '.join(subject.new)}")
    if 2 * len(covered) < len(english):
        lines.append(
            f"Only {len(covered)} of {len(english)} reviews name an aspect of the {subject.kind} that is known. Name "
            f"more in task.data.reviews.aspects, such as {{ service: [service, staff] }}"
        )
        if subject.uncovered:
            words = ", ".join(f"{word} {count}" for word, count in subject.uncovered.items())
            lines.append(f"Frequent words that no aspect covers: {words}")
    return lines
