"""The quality gate: a fine-tune that gains less than `task.evaluate.min_gain` ends with an exit code of its own."""

import sys

from core.artifacts import Evaluation

NOT_BETTER = 3  # exit code


def gain(evaluation: Evaluation) -> float:
    """The share by which held-out perplexity fell: 0.25 from 20 to 15. Negative where it rose."""
    return 1 - evaluation.after.perplexity / evaluation.before.perplexity


def pass_gate(evaluation: Evaluation, min_gain: float | None) -> int:
    """0 for a run that gains `min_gain`, or where that is None; else NOT_BETTER, and a sentence on stderr."""
    found = gain(evaluation)
    if min_gain is None or found >= min_gain:  # not a number is not enough
        return 0
    was, now = (f"{side.perplexity:.2f}" for side in (evaluation.before, evaluation.after))
    print(
        f"not good enough: held-out perplexity went from {was} to {now}, a gain of {found:.1%}, and "
        f"task.evaluate.min_gain requires {min_gain:.1%}. The run is kept. More or cleaner data, or another "
        "task.train.learning_rate or task.train.epochs, may do better",
        file=sys.stderr,
    )
    return NOT_BETTER
