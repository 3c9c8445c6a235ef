"""Measures a way to tell praise from criticism on labelled texts: how many of its claims hold, how many it finds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.reviews import labelled
from tasks.reviews.aspect_words import AspectWords
from tasks.reviews.fit_opinions import verdicts_by
from tasks.reviews.labelled import HELD_OUT, Labelled
from tasks.reviews.opinions import CRITICISM, PRAISE, Say
from tasks.reviews.read_reviews import RawReview, ReviewReader
from tasks.reviews.verdicts import CLEAR

AIM = 0.9  # precision for which a threshold is chosen
ASKED = {"praise": 0.9, "criticism": 0.9, "verdict": 0.85}  # least precision of what this project claims


class Method(NamedTuple):
    """A way to read.

    Attributes:
        scores: texts → [texts, 3], how much each says criticism, neither and praise.
        thresholds: for praise and criticism; None chooses them on the development half.
        verdict: of a review, by what its parts say; None fits a regression to reviews, as verdicts.py has one.
    """

    name: str
    scores: Callable[[Sequence[str]], NDArray[np.floating]]
    thresholds: tuple[float, float] | None = None
    verdict: Callable[[Sequence[Say]], str | None] | None = None


class Rate(NamedTuple):
    """`right` of `claims` hold; of `there` texts that say so, `found` were claimed."""

    right: int
    claims: int
    found: int
    there: int

    def __str__(self) -> str:
        return f"{_share(self.right, self.claims)} | {_share(self.found, self.there)}"


class Result(NamedTuple):
    method: str
    praise: Rate
    criticism: Rate
    aspects: Rate
    verdict: Rate


def measure(method: Method, half: str, squid_game: Path | None) -> Result:
    """
    Args:
        half: of the labelled texts.
        squid_game: the table of viewer reviews, some of which are labelled; None: without them.
    """
    sentences, reviews = labelled.sentences(half, squid_game), labelled.reviews(half, squid_game)
    known: dict[str, NDArray[np.floating]] = {}  # sentences are asked for alone and as reviews

    def scores_of(texts: Sequence[str]) -> NDArray[np.floating]:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, method.scores(new) if new else (), strict=True))
        return np.array([known[text] for text in texts]).reshape(-1, 3)

    chosen = method.thresholds
    if not chosen:
        tuned = labelled.sentences(labelled.DEVELOPMENT, squid_game)
        chosen = _choose(scores_of([one.text for one in tuned]), tuned)
    scores = scores_of([one.text for one in sentences])
    praise, criticism = (
        _rate(scores[:, column] >= threshold, [one.label for one in sentences], label)
        for column, threshold, label in ((2, chosen[0], "praise"), (0, chosen[1], "criticism"))
    )

    def judge(texts: Sequence[str]) -> list[Say]:
        return [_say(row, chosen) for row in scores_of(texts)]

    words = AspectWords("", {word: [word] for one in sentences for word, _ in one.targets})
    read = ReviewReader(words, judge).read([RawReview(row, one.text) for row, one in enumerate(sentences)])
    # Targets are the aspects: what is claimed of one, and what is said of it.
    claims = [(one, opinion) for one, review in zip(sentences, read, strict=True) for opinion in review.opinions]
    claims = [(one, opinion) for one, opinion in claims if opinion.aspect in dict(one.targets)]
    held = sum(dict(one.targets)[opinion.aspect] == (1 if opinion.is_praise else -1) for one, opinion in claims)
    aspects = Rate(held, len(claims), held, sum(bool(side) for one in sentences for _, side in one.targets))
    verdict = method.verdict or verdicts_by(judge, squid_game).verdict
    whole = ReviewReader(words, judge, verdict).read([RawReview(0, one.text) for one in reviews])
    verdicts = [review.said for review in whole]
    right = sum(verdict == one.label for verdict, one in zip(verdicts, reviews, strict=True) if verdict)
    there = sum(one.label != "none" for one in reviews)
    return Result(method.name, praise, criticism, aspects, Rate(right, sum(map(bool, verdicts)), right, there))


def _say(scores: NDArray[np.floating], thresholds: tuple[float, float]) -> Say:
    """The scores, stretched so that sides are taken from the thresholds on."""
    return Say(min(1.0, scores[2] * PRAISE / thresholds[0]), min(1.0, scores[0] * CRITICISM / thresholds[1]))


def _choose(scores: NDArray[np.floating], sentences: Sequence[Labelled]) -> tuple[float, float]:
    """For praise and criticism, the lowest threshold at which AIM of the claims hold; the highest score if none."""
    found = []
    for column, label in ((2, "praise"), (0, "criticism")):
        holds = np.array([one.label in (label, "both") for one in sentences])
        levels = np.unique(scores[:, column])
        right = [level for level in levels if holds[scores[:, column] >= level].mean() >= AIM]
        found.append(float(right[0] if right else levels[-1]))
    return found[0], found[1]


def _rate(claimed: NDArray[np.bool_], labels: Sequence[str], label: str) -> Rate:
    holds = np.array([one in (label, "both") for one in labels])
    return Rate(int((claimed & holds).sum()), int(claimed.sum()), int((claimed & holds).sum()), int(holds.sum()))


def _share(count: int, of: int) -> str:
    """`0.91 (0.85 to 0.95; 90 of 99)`: Wilson's interval of 95% (1927)."""
    from scipy.stats import binomtest

    if not of:
        return "no claims"
    interval = binomtest(count, of).proportion_ci(method="wilson")
    return f"{count / of:.2f} ({interval.low:.2f} to {interval.high:.2f}; {count} of {of})"


def page(results: Sequence[Result], half: str, squid_game: Path | None) -> str:
    """docs/reviews.md. The first result is of this project."""
    sentences, reviews = labelled.sentences(half, squid_game), labelled.reviews(half, squid_game)
    domains = sorted({one.domain for one in sentences})
    measured = f"{len(sentences)} sentences and {len(reviews)} reviews ({half}) of {', '.join(domains)}"
    new = half == HELD_OUT
    fitted = "No method was fitted to or chosen by them." if new else "Methods were fitted to and chosen by them."
    lines = [
        "# How well reviews are read",
        "",
        "Written by `python -m tasks.reviews.review_accuracy`; what it needs, it says in its `--help`.",
        "",
        *_lines(
            f"{measured}, labelled by hand in `tasks/reviews/labelled/`. {fitted} A sentence that says both counts as "
            "either. Most were written to be hard: negation, praise by comparison, dark subjects, sarcasm, plain "
            "facts. Intervals are of 95%. What no side is claimed of is neither right nor wrong, and lowers the recall."
        ),
        "",
        *_lines(
            "What is fitted learned from sentences with published ratings, and from the development half and some more "
            "sentences of `labelled/`. Except for VADER, a side is taken from about the lowest score on at which "
            f"{AIM} of the claims hold on the development half, or from the highest score where none does; as the "
            "fitted methods know that half, their thresholds are rather low. Except for VADER again, a verdict is that "
            "of a regression on what the parts of a review say, fitted to the development half and some more reviews "
            f"of `labelled/`, where it is at least {CLEAR} probable; VADER's is that of the parts which take a side."
        ),
        "",
        *_lines(_verdict(results[0])),
        "",
    ]
    for name, column in (("Praise", 1), ("Criticism", 2), ("Claims about an aspect", 3), ("Verdict of a review", 4)):
        lines += [f"| {name} | precision | recall |", "|---|---|---|"]
        lines += [f"| {result.method} | {result[column]} |" for result in results]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _verdict(own: Result) -> str:
    rates = {name: getattr(own, name) for name in ASKED}
    said = {name: f"{name} {rate.right / max(rate.claims, 1):.2f} ({ASKED[name]})" for name, rate in rates.items()}
    missed = [said[name] for name, rate in rates.items() if rate.right < ASKED[name] * rate.claims or not rate.claims]
    short = f"**Not reached: {', '.join(missed)}.** " if missed else ""
    return (
        f"Precision of this project and, in brackets, the least asked for: {', '.join(said.values())}. {short}".strip()
    )


def _lines(text: str) -> list[str]:
    return wrap(text, 118, break_long_words=False, break_on_hyphens=False)
