"""Fits the softmax regressions of opinions.py and verdicts.py, and nothing that they are measured with.

The first learns from about 8,000 sentences of film and product reviews with the mean of twenty people's ratings from -4
to 4, which VADER was made with and its source package carries (Hutto and Gilbert, 2014; MIT), and the development half
of labelled/. A rating near 0 is neither praise nor criticism. The second learns from reviews of labelled/.
"""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from tasks.reviews import labelled
from tasks.reviews.opinions import HEAD, Opinions, Say, features
from tasks.reviews.read_reviews import parts_of, sentences_of
from tasks.reviews.verdicts import HEAD as VERDICT_HEAD
from tasks.reviews.verdicts import Verdicts

RATED = ("amazonReviewSnippets_GroundTruth.txt", "movieReviewSnippets_GroundTruth.txt")
INNER = "hutto_ICWSM_2014.tar.gz"
MOST = 4000  # sentences of each file
CLEAR = 0.8  # ratings from which a sentence takes a side
OWN_WEIGHT = 5.0  # of a sentence of labelled/, which are few and of the kind that is read wrong
STRENGTH = 0.001  # of what the data may say against small weights (scikit-learn's C)
CRITICISM, NEITHER, PRAISE = range(3)


class Examples(NamedTuple):
    texts: list[str]
    classes: NDArray[np.int64]
    weights: NDArray[np.float64]


def rated_examples(archive: Path) -> Examples:
    """The rated sentences.

    Args:
        archive: vaderSentiment-3.3.2.tar.gz, by `pip download --no-deps --no-binary :all: vaderSentiment==3.3.2`.

    Raises:
        UserError: it is another file.
    """
    rated = _rated(archive)
    classes = [PRAISE if rating >= CLEAR else CRITICISM if rating <= -CLEAR else NEITHER for _, rating in rated]
    return Examples([text for text, _ in rated], np.array(classes), np.ones(len(rated)))


def with_own(rated: Examples) -> Examples:
    """`rated`, and the sentences of labelled/ that are there to be fitted to."""
    halves = labelled.FITTING, labelled.DEVELOPMENT
    own = [one for half in halves for one in labelled.sentences(half, None) if one.label != "both"]
    known = {"praise": PRAISE, "criticism": CRITICISM, "neither": NEITHER}
    return Examples(
        [*rated.texts, *(one.text for one in own)],
        np.append(rated.classes, [known[one.label] for one in own]),
        np.append(rated.weights, [OWN_WEIGHT] * len(own)),
    )


def fit(archive: Path) -> None:
    """Write HEAD, from the features of all sentences: minutes, on two cores."""
    from safetensors.numpy import save_file
    from sklearn.linear_model import LogisticRegression

    known = with_own(rated_examples(archive))
    x = features(known.texts)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    model = LogisticRegression(C=STRENGTH, max_iter=1000).fit((x - mean) / scale, known.classes, known.weights)
    weights = (model.coef_ / scale).T
    bias = model.intercept_ - mean @ weights
    save_file({"weights": weights.astype(np.float32), "bias": bias.astype(np.float32)}, HEAD)


def fit_verdicts(squid_game: Path | None) -> None:
    """Write the verdicts' HEAD, by what `Opinions` says of the parts of reviews.

    Args:
        squid_game: the table of viewer reviews, some of which are labelled; None: without them.
    """
    from safetensors.numpy import save_file

    head = verdicts_by(Opinions().read, squid_game)
    save_file({"weights": head.weights.astype(np.float32), "bias": head.bias.astype(np.float32)}, VERDICT_HEAD)


def verdicts_by(judge: Callable[[Sequence[str]], list[Say]], squid_game: Path | None) -> Verdicts:
    """A regression for verdicts, fitted to what `judge` says of the parts of the reviews that are there for that."""
    halves = labelled.FITTING, labelled.DEVELOPMENT
    reviews = [one for half in halves for one in labelled.reviews(half, squid_game)]
    parts = [parts_of(sentences_of(one.text)) for one in reviews]
    said = iter(judge([part for some in parts for part in some]))
    return Verdicts.fitted([[next(said) for _ in some] for some in parts], [one.label for one in reviews])


def _rated(archive: Path) -> list[tuple[str, float]]:
    """Sentences and their mean ratings."""
    found: list[tuple[str, float]] = []
    try:
        with tarfile.open(archive) as outer:
            member = next(one for one in outer if one.name.endswith(INNER))
            with tarfile.open(fileobj=io.BytesIO(_content(outer, member))) as inner:
                files = {Path(one.name).name: one for one in inner if one.isfile()}
                for name in RATED:
                    text = _content(inner, files[name]).decode("latin-1")
                    rows = [line.split("\t", 2)[1:] for line in text.splitlines() if line.count("\t") >= 2]
                    said = [(sentence.replace("''", '"').strip(), float(rating)) for rating, sentence in rows]
                    said = [one for one in said if one[0]]
                    Random(0).shuffle(said)
                    found += said[:MOST]
    except (OSError, tarfile.TarError, StopIteration, KeyError) as error:
        raise UserError(
            f"{archive} is not the source package of VADER ({error}). Get it: pip download --no-deps --no-binary :all: "
            f"vaderSentiment==3.3.2"
        ) from None
    return found


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""
