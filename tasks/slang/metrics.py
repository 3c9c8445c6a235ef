"""Metrics of a slang generator: whether its term is new, and whether it fits the scene."""

import numpy as np

from core.artifacts import Generation
from core.errors import UserError
from evaluation.metrics import Evidence, Generations, Metric, Scores
from tasks.slang.novelty import Novelty


def new_term(generations: Generations, evidence: Evidence) -> Scores:
    """Answers with a definition and a term of one to four words that is new: neither known slang, which the terms of
    all rows and their spellings are, nor words of the question, an English word or a common phrase.

    See `tasks/slang/novelty.py`. A common word in a new sense does not count, as no list can tell it. The examples' own
    answers are known and have no score.
    """
    try:
        novelty = Novelty.read(evidence.folder)
    except FileNotFoundError:
        raise UserError(
            f"{evidence.folder} has no list of known slang, as an older version prepared it. Prepare the same rows "
            "again: make data TASK=slang SOURCE=…"
        ) from None

    def is_new(line: Generation) -> bool:
        entry = evidence.prompt.read_response(line.text)
        return bool(entry.get("description")) and not novelty.why_not(entry.get("slang", ""), line.asked)

    return [None if line.side == "reference" else float(is_new(line)) for line in generations]


def fits_scene(generations: Generations, evidence: Evidence) -> Scores:
    """How surely the definition and example tell which scene was asked about: the share of the other scenes asked about
    that they are less alike. By chance, or where they say nothing, 50%.

    Likeness is the cosine of `evaluation/embeddings.py`, by the base model's embedding table and weights from the
    training rows, so runs of different bases are measured differently. A scene that is equally alike counts half.
    """
    from evaluation.embeddings import Embedder

    scenes = [line.fields.get("context", "") for line in generations]
    asked = sorted({scene for scene in scenes if scene})
    if len(asked) < 2:
        return [None] * len(generations)
    embed = Embedder(evidence.base_folder, [f"{row.get('context', '')} {row['output']}" for row in evidence.training])
    read = [evidence.prompt.read_response(line.text) for line in generations]
    said = [f"{fields.get('description', '')} {fields.get('example', '')}".strip() for fields in read]
    likeness = embed(said) @ embed(asked).T

    def share(place: int, scene: str) -> float:
        own = likeness[place, asked.index(scene)]
        less, same = np.sum(likeness[place] < own), np.sum(likeness[place] == own) - 1
        return float((less + same / 2) / (len(asked) - 1))

    return [share(place, scene) if scene else None for place, scene in enumerate(scenes)]


METRICS = [
    Metric("New term", new_term, "higher", "yes/no"),
    Metric("Fits its scene", fits_scene, "higher"),
]
