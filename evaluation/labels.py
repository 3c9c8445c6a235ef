"""How well both models name labels: accuracy, F1 and confusion matrix, where a task's answers are a few labels.

A task has labels where all training answers are short, on one line, and few, so that each occurs again and again. What
an answer names is read leniently, so that a model which says "The label is spam." is not counted wrong for its manner:
its first line is a label, or holds exactly one. An answer that names none is wrong, and counted by itself.

F1 is the mean over the labels of the asked rows (macro), each the harmonic mean of its precision and recall. Its
interval, and that of differences, is resampled over rows; shares that are counted have Wilson's (intervals.py).
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.artifacts import Change, Estimate, Generation, LabelCounts, Labels
from evaluation.intervals import RESAMPLES, SEED, estimates, interval, wilson
from evaluation.metrics import Evidence

MOST, LONGEST = 200, 60  # labels of a task, and letters of a label


def measure_labels(generations: Sequence[Generation], evidence: Evidence) -> Labels | None:
    """What both models named on the held-out rows that were asked; None where the task's answers are no labels."""
    training = Counter(_plain(text) for text in evidence.targets)
    if not _are_labels(evidence.targets, training):
        return None
    asked = {one.question: one for one in generations if one.reference is not None and one.side == "after"}
    before = {one.question: one for one in generations if one.side == "before"}
    rows = [(one, before[question]) for question, one in asked.items() if question in before]
    if not rows:
        return None
    truth = [_plain(one.reference or "") for one, _ in rows]
    spelled = {
        _plain(text): " ".join(text.split()) for text in (*evidence.targets, *(o.reference or "" for o, _ in rows))
    }
    names = sorted({*training, *truth})
    place = {name: number for number, name in enumerate(names)}
    true = np.array([place[name] for name in truth])
    answers = ([pair[side].text for pair in rows] for side in (1, 0))
    sides = [np.array([place.get(_named(text, names) or "", len(names)) for text in texts]) for texts in answers]
    ((usual, _),) = training.most_common(1)
    return Labels(
        questions=len(rows),
        labels=[
            LabelCounts(label=spelled[name], training=training[name], asked=int((true == number).sum()),
                        before=_recall(true, sides[0], number), after=_recall(true, sides[1], number))
            for name, number in place.items()
        ],
        usual=wilson(float((true == place[usual]).mean()), len(rows)),
        accuracy=_accuracy(true, sides),
        f1=_f1(true, sides, len(names)),
        confusion_before=_confusion(true, sides[0], len(names)).tolist(),
        confusion_after=_confusion(true, sides[1], len(names)).tolist(),
    )  # fmt: skip


def _are_labels(targets: Sequence[str], counts: Counter[str]) -> bool:
    short = all(len(text) <= LONGEST and "\n" not in text.strip() for text in targets)
    return short and 2 <= len(counts) <= min(MOST, len(targets) / 3)


def _plain(text: str) -> str:
    folded = " ".join(text.casefold().split())
    return folded.strip(" .\"'*") or folded


def _named(answer: str, names: Sequence[str]) -> str | None:
    """The label that an answer names; None where it names none, or several that are not parts of one."""
    first = _plain(answer.strip().partition("\n")[0])
    word = re.match(r"\W*(\w*)", first)
    for whole in (first, word[1] if word else ""):
        if whole in names:
            return whole
    # "a" and "no" stand in many a sentence without being its label.
    found = [name for name in names if len(name) > 2 and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", first)]
    longest = [name for name in found if not any(name != other and name in other for other in found)]
    return longest[0] if len(longest) == 1 else None


def _confusion(true: NDArray[np.int64], named: NDArray[np.int64], labels: int) -> NDArray[np.int64]:
    """Counts `[labels, labels + 1]`, a row for each true label; the last column is of answers that name none."""
    pairs = true * (labels + 1) + named
    return np.bincount(pairs, minlength=labels * (labels + 1)).reshape(labels, labels + 1)


def _macro_f1(confusion: NDArray[np.int64]) -> float:
    """Of labels that are true of some row: 2 · hits / (rows with the label + answers with the label)."""
    hits, true, named = confusion.diagonal(), confusion.sum(1), confusion[:, :-1].sum(0)
    return float(np.mean(2 * hits[true > 0] / (true + named)[true > 0]))


def _accuracy(true: NDArray[np.int64], sides: Sequence[NDArray[np.int64]]) -> Change:
    series = [np.stack([(named == true).astype(float), np.ones(len(true))], axis=1) for named in sides]
    found = estimates(*series)
    return found.model_copy(
        update={"before": wilson(found.before[0], len(true)), "after": wilson(found.after[0], len(true))}
    )


def _f1(true: NDArray[np.int64], sides: Sequence[NDArray[np.int64]], labels: int) -> Change:
    generator, units = np.random.default_rng(SEED), len(true)
    values = [_macro_f1(_confusion(true, named, labels)) for named in sides]
    draws = np.empty((2, RESAMPLES))
    for number in range(RESAMPLES):
        drawn = generator.integers(units, size=units)
        draws[:, number] = [_macro_f1(_confusion(true[drawn], named[drawn], labels)) for named in sides]
    return Change(
        before=interval(values[0], draws[0], units),
        after=interval(values[1], draws[1], units),
        difference=interval(values[1] - values[0], draws[1] - draws[0], units),
    )


def _recall(true: NDArray[np.int64], named: NDArray[np.int64], label: int) -> Estimate | None:
    rows = true == label
    return wilson(float((named[rows] == label).mean()), int(rows.sum())) if rows.any() else None
