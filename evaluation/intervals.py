"""How far a metric would move with other examples or questions: 95% intervals.

Units are examples, or questions with all their answers. Means are resampled: units are drawn again with replacement
(Efron, 1979), the same ones for both models, so that the interval of a difference is a paired one (Koehn, 2004). Where
all units have the same value, resampling finds no width, which is no certainty: there the interval is left out.

Shares of answers that have or have not a thing are counted: their interval is Wilson's score interval (1927), which
keeps its width where nine of nine questions agree, and that of their difference is Newcombe's for pairs (1998).
Neither includes how much another training run would differ.
"""

from collections.abc import Callable
from math import exp, sqrt

import numpy as np
from numpy.typing import NDArray

from core.artifacts import Change, Estimate, Evaluation, HeldOut

RESAMPLES, SEED = 2000, 0
Z = 1.959963984540054  # of a normal distribution: 95% lie within ± Z
AT_ONCE = 1 << 18  # units drawn at a time: what the processor's cache holds


def resample(*series: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of several series over the same units, drawn again RESAMPLES times: [series, RESAMPLES].

    Args:
        series: [units, 2] each: the sum of a unit's values, and how many they are. A mean is Σ sums / Σ counts.
    """
    generator, units = np.random.default_rng(SEED), len(series[0])
    means = np.empty((len(series), RESAMPLES))
    together = max(1, AT_ONCE // units)
    for start in range(0, RESAMPLES, together):
        drawn = generator.integers(units, size=(min(together, RESAMPLES - start), units))
        for mean, values in zip(means, series, strict=True):
            sums, counts = values[drawn].sum(1).T
            mean[start : start + len(drawn)] = sums / counts
    return means


def interval(value: float, draws: NDArray[np.float64], units: int) -> Estimate:
    """`(value, low, high)` of 95%, of `draws` [RESAMPLES]; without bounds for a single unit, or where all are alike."""
    low, high = np.percentile(draws, [2.5, 97.5]).tolist()
    return (value, low, high) if units > 1 and np.ptp(draws) > 1e-12 else (value, None, None)


def estimates(before: NDArray[np.float64], after: NDArray[np.float64]) -> Change:
    """Means of two series, as in `resample`, and their difference."""
    was, now = (float(values[:, 0].sum() / values[:, 1].sum()) for values in (before, after))
    draws, units = resample(before, after), len(before)
    return Change(
        before=interval(was, draws[0], units),
        after=interval(now, draws[1], units),
        difference=interval(now - was, draws[1] - draws[0], units),
    )


def wilson(share: float, units: float) -> Estimate:
    """`(share, low, high)`: Wilson's 95% interval of a share that `units` independent units were counted for."""
    middle = share + Z**2 / (2 * units)
    half = Z * sqrt(share * (1 - share) / units + (Z / (2 * units)) ** 2)
    low, high = ((middle + side * half) / (1 + Z**2 / units) for side in (-1, 1))
    return share, min(max(low, 0.0), share), max(min(high, 1.0), share)  # beyond 0, 1 or the share by rounding alone


def share_estimates(before: NDArray[np.float64], after: NDArray[np.float64]) -> Change:
    """Shares of two series of yes (1) and no (0), as in `resample`, and their difference.

    The answers to one question are one unit, as they may all be alike. Where questions have unequal numbers of answers
    n, they count as Kish's (Σn)² / Σn² questions.
    """
    was, now = (_counted(series) for series in (before, after))
    # Newcombe's method 10: how far each share may go, less what both models do together, which his correction for
    # continuity keeps from being certain.
    questions = np.stack([values[:, 0] / values[:, 1] for values in (before, after)])
    (ours, both), (_, theirs) = np.cov(questions, bias=True)
    both = max(both - 1 / (2 * questions.shape[1]), 0.0) if both > 0 else both
    together = float(both / sqrt(ours * theirs)) if ours * theirs > 0 else 0.0

    def reach(one: float, other: float) -> float:
        return sqrt(max(one**2 - 2 * together * one * other + other**2, 0.0))

    difference = now[0] - was[0]
    low = difference - reach(now[0] - (now[1] or 0), (was[2] or 0) - was[0])
    high = difference + reach((now[2] or 0) - now[0], was[0] - (was[1] or 0))
    return Change(before=was, after=now, difference=(difference, low, high))


def _counted(series: NDArray[np.float64]) -> Estimate:
    yes, answers = series.T
    return wilson(float(yes.sum() / answers.sum()), float(answers.sum() ** 2 / (answers**2).sum()))


def held_out(evaluation: Evaluation) -> HeldOut | None:
    """Loss and perplexity on the test split, with intervals over its examples; None where these were not measured
    one by one, as in old runs."""
    before, after = evaluation.before.rows, evaluation.after.rows
    if not before or not after:
        return None
    loss = estimates(np.array(before, dtype=float), np.array(after, dtype=float))
    perplexity = Change(before=_map(exp, loss.before), after=_map(exp, loss.after))
    # The ratio of two perplexities is the exponential of the difference of the losses.
    value, low, high = _map(lambda difference: 1 - exp(difference), loss.difference)
    return HeldOut(loss=loss, perplexity=perplexity, gain=(value, high, low))


def _map(function: Callable[[float], float], estimate: Estimate) -> Estimate:
    value, low, high = estimate
    if low is None or high is None:
        return function(value), None, None
    return function(value), function(low), function(high)
