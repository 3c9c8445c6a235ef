"""Short texts as vectors, from the token embeddings of a base model: no other model is needed."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer


class Embedder:
    """A text is the sum of its tokens' embeddings, each of length 1 and weighted by how few of `corpus` have the token
    (smooth inverse frequency: Arora et al., 2017), minus the corpus' mean, which only tells the language.
    """

    def __init__(self, base_folder: Path, corpus: Sequence[str]) -> None:
        self._tokenizer = Tokenizer.from_file(str(base_folder / "tokenizer.json"))
        self._file, self._name, self._width = _find_table(base_folder)
        self._seen = Counter(token for text in corpus for token in self._tokens(text))
        self._texts = len(corpus)
        self._mean = self._sums(corpus).mean(0)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts, features], each of length 1; of length 0 where a text is empty."""
        vectors = self._sums(texts)
        told = vectors.any(1, keepdims=True)
        vectors = np.where(told, vectors - self._mean, 0.0)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _tokens(self, text: str) -> set[int]:
        return set(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _sums(self, texts: Sequence[str]) -> NDArray[np.float64]:
        tokens = [self._tokens(text) for text in texts]
        table = self._rows(sorted(set().union(*tokens)))
        zero = np.zeros(self._width)
        return np.array([sum((self._weight(one) * table[one] for one in sorted(own)), zero) for own in tokens])

    def _weight(self, token: int) -> float:
        return float(np.log((1 + self._texts) / (1 + self._seen[token])))

    def _rows(self, tokens: Sequence[int]) -> dict[int, NDArray[np.float64]]:
        """Of the table, which may have gigabytes, only what is needed."""
        with safe_open(self._file, "pt") as file:
            table = file.get_slice(self._name)
            rows = {token: table[token : token + 1][0].double().numpy() for token in tokens}
        return {token: row / max(float(np.linalg.norm(row)), 1e-12) for token, row in rows.items()}


def _find_table(base_folder: Path) -> tuple[Path, str, int]:
    """File and name of the token embeddings, of whole or sharded weights, and their features."""
    for file in sorted(base_folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if name.endswith("embed_tokens.weight"):
                    return file, name, weights.get_slice(name).get_shape()[1]
    raise FileNotFoundError(f"no token embeddings in {base_folder}/*.safetensors")
