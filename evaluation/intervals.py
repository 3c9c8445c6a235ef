"""How far a figure would move with other rows or questions: intervals of 95%, by the percentile bootstrap.

Units, which are rows, or questions with all their answers, are drawn again with replacement (Efron, 1979), the same
ones for both models, so that the interval of a difference is a paired one (Koehn, 2004). How another training run would
turn out is not in it. Where all units say the same, the interval has no width; that is no certainty.
"""

from collections.abc import Callable, Mapping
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def interval(value: float, draws: NDArray[np.float64], units: int) -> list[float | None]:
    """`[value, low, high]` of 95%; of a single unit nothing is known but its value."""
    low, high = np.percentile(draws, [2.5, 97.5]).tolist()
    return [value, low, high] if units > 1 else [value, None, None]


def estimates(before: NDArray[np.float64], after: NDArray[np.float64]) -> dict[str, list[float | None]]:
    """`{"before", "after", "difference"}`, each `[value, low, high]`, of two series as in `resample`."""
    was, now = (float(values[:, 0].sum() / values[:, 1].sum()) for values in (before, after))
    draws, units = resample(before, after), len(before)
    return {
        "before": interval(was, draws[0], units),
        "after": interval(now, draws[1], units),
        "difference": interval(now - was, draws[1] - draws[0], units),
    }


def held_out(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and perplexity on held-out rows, with intervals over rows.

    Args:
        evaluation: `evaluation.json`.

    Returns:
        `{"loss": {"before", "after", "difference"}, "perplexity": {"before", "after"}, "gain"}`, each `[value, low,
        high]`; `gain` is the share by which perplexity fell. {} for a run from before rows were measured one by one.
    """
    if "rows" not in evaluation["before"] or "rows" not in evaluation["after"]:
        return {}
    loss = estimates(*(np.array(evaluation[side]["rows"], dtype=float) for side in ("before", "after")))
    perplexity = {side: [_of(exp, value) for value in loss[side]] for side in ("before", "after")}
    # The ratio of two perplexities is the exponential of the difference of the losses.
    value, low, high = (_of(lambda it: 1 - exp(it), difference) for difference in loss["difference"])
    return {"loss": loss, "perplexity": perplexity, "gain": [value, high, low]}


def _of(function: Callable[[float], float], value: float | None) -> float | None:
    return None if value is None else function(value)
