"""Metrics of a review chatbot: whether it says what the reviews say, and nothing else."""

import re
from typing import Any

from core.artifacts import Generation
from core.files import read_json
from evaluation.metrics import Evidence, Generations, Metric, Scores, words

QUOTE = re.compile(r'["“]([^"“”\n]+)["”]')
SHORTEST_QUOTE = 3  # words; fewer are a title or a doubt
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def aspects_named(generations: Generations, evidence: Evidence) -> Scores:
    """How many aspects, such as acting or service, the answer names that the reviews speak of too.

    By the words that the reviews were read with (knowledge.json); an aspect counts once.
    """
    known = {aspect["name"] for aspect in _knowledge(evidence).get("aspects", []) if aspect["mentions"]}
    return [float(len(known & review.mentions)) for review in _understood(generations, evidence)]


def agreement(generations: Generations, evidence: Evidence) -> Scores:
    """Of the reviewers who judge an aspect that the answer judges too, how many judge it the same way; the mean over
    the answer's aspects.

    Judgements are those of tasks/reviews/knowledge.py, in answers as in reviews. A review that finds both good and bad
    in an aspect agrees with either. An answer that judges nothing is left out.
    """
    aspects = {aspect["name"]: aspect for aspect in _knowledge(evidence).get("aspects", [])}

    def share(name: str, favourable: bool) -> float | None:
        counts = aspects.get(name, {"favourable": 0, "unfavourable": 0, "both": 0})
        judged = counts["favourable"] + counts["unfavourable"] + counts["both"]
        same = counts["both"] + counts["favourable" if favourable else "unfavourable"]
        return same / judged if judged else None

    scores: Scores = []
    for review in _understood(generations, evidence):
        judged = {(opinion.aspect, opinion.is_praise) for opinion in review.opinions}
        shares = [found for name, good in sorted(judged) if (found := share(name, good)) is not None]
        scores.append(sum(shares) / len(shares) if shares else None)
    return scores


def unsupported(generations: Generations, evidence: Evidence) -> Scores:
    """Quotes in the answer that no review holds, and numbers that are none of the counts: how many in an answer.

    A quote, of three words or more between quotation marks, is looked for in all rows' answers, which quote reviews
    word for word, and in knowledge.json; so is a number, which may be found there and still be another thing's.
    """
    rows = [str(row.get("output", "")) for row in evidence.examples]
    known = [*rows, *_texts(_knowledge(evidence))]
    said = f" {' '.join(words(' '.join(known)))} "
    counted = {number for text in known for number in NUMBER.findall(text)}

    def count(line: Generation) -> float:
        quotes = [quote for quote in map(words, QUOTE.findall(line.text)) if len(quote) >= SHORTEST_QUOTE]
        invented = [quote for quote in quotes if f" {' '.join(quote)} " not in said]
        unquoted = QUOTE.sub(" ", line.text)
        asked = NUMBER.findall(line.text_in)
        return float(
            len(invented) + sum(number not in counted and number not in asked for number in NUMBER.findall(unquoted))
        )

    return [count(line) for line in generations]


def _knowledge(evidence: Evidence) -> dict[str, Any]:
    """What data preparation counted in all reviews, see tasks/reviews/rows.py."""
    return read_json(evidence.folder / "knowledge.json")


def _understood(generations: Generations, evidence: Evidence) -> list[Any]:
    """Each answer read as a review is."""
    from tasks.reviews.aspect_words import AspectWords
    from tasks.reviews.opinions import Opinions
    from tasks.reviews.read_reviews import RawReview, ReviewReader

    known = _knowledge(evidence)
    words = AspectWords(known.get("title", ""), {one["name"]: one["words"] for one in known.get("aspects", [])})
    return ReviewReader(words, Opinions().read).read([RawReview(0, line.text) for line in generations])


def _texts(tree: Any) -> list[str]:
    """All texts and numbers in a JSON tree."""
    if isinstance(tree, dict):
        return [text for value in tree.values() for text in _texts(value)]
    if isinstance(tree, list):
        return [text for value in tree for text in _texts(value)]
    return [str(tree)]


METRICS = [
    Metric("Aspects named", aspects_named, "higher", "aspects"),
    Metric("Judges as reviewers do", agreement, "higher"),
    Metric("Without support", unsupported, "lower", "statements"),
]
