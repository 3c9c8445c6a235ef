"""The quality gate: a fine-tune that gains less than `task.evaluate.min_gain` ends with an exit code of its own."""

import sys
from collections.abc import Mapping
from typing import Any

NOT_BETTER = 3  # exit code


def gain(evaluation: Mapping[str, Any]) -> float:
    """By which share of itself held-out perplexity fell: 0.25 from 20 to 15. Below 0 where it rose.

    Args:
        evaluation: `evaluation.json` of a run.
    """
    return 1 - evaluation["after"]["perplexity"] / evaluation["before"]["perplexity"]


def pass_gate(evaluation: Mapping[str, Any], min_gain: float | None) -> int:
    """0 for a run that gains `min_gain`, or where nothing is asked for; else NOT_BETTER, and a sentence on stderr."""
    found = gain(evaluation)
    if min_gain is None or found >= min_gain:  # not a number is not enough
        return 0
    was, now = (f"{evaluation[side]['perplexity']:.2f}" for side in ("before", "after"))
    print(
        f"not good enough: held-out perplexity was {was} and is {now}, a gain of {found:.1%}; task.evaluate.min_gain "
        f"asks for {min_gain:.1%}. The run is kept. More or cleaner rows, or another task.train.learning_rate or "
        "task.train.epochs, may do better",
        file=sys.stderr,
    )
    return NOT_BETTER
