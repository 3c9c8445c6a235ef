"""The interface between scheduler and model: what a step computes, and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from serving.engine.adapters import LoraAdapter
from serving.engine.architecture import GemmaConfig

NOTHING, BEST, LOGITS = range(3)  # what a chunk wants of its last token


@dataclass
class Chunk:
    """The tokens of one request in a step, at consecutive positions.

    Attributes:
        first: the index of its first token in the step.
        count: the number of tokens.
        start: the position of its first token; as many keys and values are in the cache already.
        blocks: of the cache, in the order of positions.
        output: after its last token: NOTHING, BEST (the most likely token), or LOGITS as well.
        adapter: None: the base.
    """

    first: int
    count: int
    start: int
    blocks: Sequence[int]
    output: int = NOTHING
    adapter: LoraAdapter | None = None


class Model(Protocol):
    """A Gemma with its key/value cache.

    Attributes:
        table: the per-layer embedding of Gemma 4's small sizes, mapped from its file and read by rows.
    """

    config: GemmaConfig
    table: Tensor | None

    def step(self, tokens: list[int], chunks: list[Chunk]) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Compute one step, and write its keys and values to the cache.

        Args:
            tokens: of all requests in this step.
            chunks: cover `tokens` in order.

        Returns:
            For each chunk with an `output`, in order, after its last token: the most likely token; and logits
            [chunks, vocabulary], which are undefined for a chunk that wants only the best token.

        Raises:
            MemoryError: the step needs more memory than there is.
        """
