"""Tells what a sentence of a review says: praise, criticism, or neither, with the probability of each.

The embedded base model reads it (Gemma 3 270M, whatever MODEL is to be trained): what its layers hold at the end of

    A reviewer wrote: "…"
    In one word, the reviewer found it

is the word that it is about to say. A softmax regression on that, 640 numbers, was fitted to sentences that people have
rated (fit_opinions.py). A side is taken only where the probability is so high that nine of ten such claims hold on the
development half of labelled/; docs/reviews.md has the other half, and other methods beside this one.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.base_model import ensure_base_model
from core.configuration import load_config
from core.progress import Progress

HEAD = Path(__file__).parent / "opinions.safetensors"
READER = "gemma-3-270m"  # which everybody has
LAYER = 12  # of 18; later ones know no more of it
BEFORE, AFTER = 'A reviewer wrote: "', '"\nIn one word, the reviewer found it'
LONGEST = 120  # tokens of a sentence that are read
BATCH = 2048  # tokens that are read together
PRAISE, CRITICISM = 0.8, 0.9  # probabilities from which a side is taken


class Say(NamedTuple):
    """What a sentence says: the probabilities that it praises and that it criticises."""

    praise: float
    criticism: float

    @property
    def side(self) -> int:
        """1 for praise, -1 for criticism, 0 for neither or nothing certain."""
        return int(self.praise >= PRAISE) - int(self.criticism >= CRITICISM)

    @property
    def certainty(self) -> float:
        return max(self.praise, self.criticism)


class Opinions:
    """Reads sentences. The model is loaded when there is one to read."""

    def read(self, texts: Sequence[str]) -> list[Say]:
        return [Say(float(praise), float(criticism)) for criticism, _, praise in self.scores(texts)]

    def scores(self, texts: Sequence[str]) -> NDArray[np.floating]:
        """[texts, 3]: the probabilities of criticism, neither and praise."""
        if not texts:
            return np.empty((0, 3))
        weights, bias = _head()
        scores = features(texts) @ weights + bias
        chances = np.exp(scores - scores.max(1, keepdims=True))
        return chances / chances.sum(1, keepdims=True)


def features(texts: Sequence[str]) -> NDArray[np.float32]:
    """[texts, 640]: the model's state where it is about to say what the reviewer found."""
    import torch

    tokenizer, model = _reader()
    before = tokenizer(BEFORE).input_ids
    after = tokenizer(AFTER, add_special_tokens=False).input_ids
    tokens = [[*before, *ids[:LONGEST], *after] for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
    found = np.empty((len(texts), model.config.hidden_size), np.float32)
    order = sorted(range(len(texts)), key=lambda place: len(tokens[place]))
    with Progress("Reading what reviews say", len(order)) as progress, torch.inference_mode():
        start = 0
        while start < len(order):
            count = max(1, BATCH // len(tokens[order[min(start + 15, len(order) - 1)]]))
            batch = order[start : start + count]
            width = max(len(tokens[place]) for place in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, place in enumerate(batch):
                # What follows the end is not seen from there.
                ids[row, : len(tokens[place])] = torch.tensor(tokens[place])
                mask[row, : len(tokens[place])] = 1
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
            for row, place in enumerate(batch):
                found[place] = states[row, len(tokens[place]) - 1].float().numpy()
            start += count
            progress.at(start)
    return found


@cache
def _reader() -> tuple[Any, Any]:
    """Tokenizer and model, cut off after LAYER."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = ensure_base_model(load_config([f"model={READER}", "trainer=cpu"]).model)
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    model.layers = model.layers[:LAYER]
    model.norm = torch.nn.Identity()
    return AutoTokenizer.from_pretrained(folder), model.eval()


@cache
def _head() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights [640, 3] and biases [3] for criticism, neither, praise."""
    from safetensors.numpy import load_file

    head = load_file(HEAD)
    return head["weights"], head["bias"]
