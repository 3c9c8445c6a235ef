"""Tells the verdict of a whole review (positive, mixed or negative) from what its parts say, or leaves it open.

Evidence are the log-odds of praise and of criticism, each against neither: the highest, the lowest and the mean of all
parts, and those of the last part, where reviewers sum up. A softmax regression on these eight numbers was fitted to the
reviews of labelled/ that are not held out (fit_opinions.py). A verdict is given only where it is as probable as CLEAR,
from which on nine of ten held in cross-validation. Most mixed reviews are left open.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.reviews.opinions import Say

HEAD = Path(__file__).parent / "verdicts.safetensors"
CLEAR = 0.8
LABELS = "positive", "mixed", "negative", "none"  # the last: facts alone
STRENGTH = 0.3  # of what the reviews may say against small weights (scikit-learn's C)
_LEAST = 1e-6  # probability


class Verdicts(NamedTuple):
    """A softmax regression: weights [8, 4] and biases [4]."""

    weights: NDArray[np.floating]
    bias: NDArray[np.floating]

    @classmethod
    def fitted(cls, said: Sequence[Sequence[Say]], labels: Sequence[str]) -> "Verdicts":
        """
        Args:
            said: what the parts of each review say.
            labels: its label, of LABELS.
        """
        from sklearn.linear_model import LogisticRegression

        x = np.array([_evidence(parts) for parts in said])
        mean, scale = x.mean(0), x.std(0) + 1e-6
        known = [LABELS.index(label) for label in labels]
        model = LogisticRegression(C=STRENGTH, max_iter=1000).fit((x - mean) / scale, known)
        weights = (model.coef_ / scale).T
        return cls(weights, model.intercept_ - mean @ weights)

    def verdict(self, said: Sequence[Say]) -> str | None:
        """The verdict of a review whose parts, in their order, say this; None if it is not clear."""
        if not said:
            return None
        scores = _evidence(said) @ self.weights + self.bias
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        best = int(chances.argmax())
        return LABELS[best] if chances[best] >= CLEAR and LABELS[best] != "none" else None


def verdict_of(said: Sequence[Say]) -> str | None:
    """`Verdicts.verdict` by the regression that is shipped, which reads what `Opinions` says."""
    return _shipped().verdict(said)


def _evidence(said: Sequence[Say]) -> NDArray[np.float64]:
    chances = np.array([[say.praise, say.criticism, 1 - say.praise - say.criticism] for say in said])
    logs = np.log(np.maximum(chances, _LEAST))
    odds = logs[:, :2] - logs[:, 2:]
    return np.concatenate([odds.max(0), odds.min(0), odds.mean(0), odds[-1]])


@cache
def _shipped() -> Verdicts:
    from safetensors.numpy import load_file

    head = load_file(HEAD)
    return Verdicts(head["weights"], head["bias"])
