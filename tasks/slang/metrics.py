"""Metrics of a slang generator: whether its term is new, and whether it fits the scene."""

import numpy as np

from data_prep.clean_text import key_of
from data_prep.near_duplicates import SAME_KEY
from evaluation.metrics import Evidence, Generations, Metric, Scores


def new_term(generations: Generations, evidence: Evidence) -> Scores:
    """Answers whose term is none of the training rows' and not a spelling of one. Answers without a term have none.

    Terms are compared as data preparation does: by `key_of`, without case, spaces and punctuation, and near from
    RapidFuzz's ratio of `SAME_KEY` on (LOL and LOLZ have 86, bussin and bussing 92).
    """
    from rapidfuzz import fuzz, process

    learned = {key_of(row["slang"]) for row in evidence.training if row.get("slang")}

    def is_new(term: str) -> bool:
        key = key_of(term)
        return bool(key) and process.extractOne(key, learned, scorer=fuzz.ratio, score_cutoff=SAME_KEY) is None

    terms = (evidence.prompt.read_response(line.text).get("slang", "") for line in generations)
    return [float(is_new(term)) for term in terms]


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
