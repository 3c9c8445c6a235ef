"""The quality gate: a fine-tune that gains less than `task.evaluate.min_gain`, or whose answers score less than
`task.evaluate.min_scores`, ends with an exit code of its own."""

import sys
from collections.abc import Mapping

from core.artifacts import Evaluation, Metrics

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
    return _refuse(
        f"held-out perplexity went from {was} to {now}, a gain of {found:.1%}, and task.evaluate.min_gain requires "
        f"{min_gain:.1%}",
        "More or cleaner data, or another task.train.learning_rate or task.train.epochs, may do better",
    )


def pass_scores(metrics: Metrics, min_scores: Mapping[str, float]) -> int:
    """0 where the fine-tuned model's answers score at least `min_scores`; else NOT_BETTER, and a sentence on stderr
    for each metric in which they do not. A metric that applies to no question is not passed."""
    scored = {metric.name: metric for metric in metrics.metrics}
    code = 0
    for name, least in min_scores.items():
        if name not in scored:
            code = _refuse(f"{name}, which task.evaluate.min_scores names, applies to no question", "Ask others")
        elif not scored[name].after[0] >= least:
            value, low, high = scored[name].after
            range_ = "" if low is None else f" (95% interval {low:.3g} to {high:.3g})"
            code = _refuse(
                f"{name} is {value:.3g}{range_} over {scored[name].questions} questions, and "
                f"task.evaluate.min_scores requires {least:g}",
                "The report shows the answers",
            )
    return code


def _refuse(why: str, advice: str) -> int:
    print(f"not good enough: {why}. The run is kept. {advice}", file=sys.stderr)
    return NOT_BETTER
