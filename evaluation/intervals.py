"""How far a metric would move with other examples or questions: 95% intervals by the percentile bootstrap.

Units, which are examples, or questions with all their answers, are drawn again with replacement (Efron, 1979), the same
ones for both models, so that the interval of a difference is a paired one (Koehn, 2004). It does not include how much
another training run would differ. Where all units have the same value the interval has no width, which is no certainty.
"""

from collections.abc import Callable
from math import exp

import numpy as np
from numpy.typing import NDArray

from core.artifacts import Change, Estimate, Evaluation, HeldOut

RESAMPLES, SEED = 2000, 0
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
    """`(value, low, high)` of 95%, of `draws` [RESAMPLES]; without bounds for a single unit."""
    low, high = np.percentile(draws, [2.5, 97.5]).tolist()
    return (value, low, high) if units > 1 else (value, None, None)


def estimates(before: NDArray[np.float64], after: NDArray[np.float64]) -> Change:
    """Means of two series, as in `resample`, and their difference."""
    was, now = (float(values[:, 0].sum() / values[:, 1].sum()) for values in (before, after))
    draws, units = resample(before, after), len(before)
    return Change(
        before=interval(was, draws[0], units),
        after=interval(now, draws[1], units),
        difference=interval(now - was, draws[1] - draws[0], units),
    )


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
