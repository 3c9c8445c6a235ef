"""What a Gemma is: its architecture as config.json tells it, its weights in safetensors, and what a step is made of."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from serving.engine import UserError

if TYPE_CHECKING:
    from serving.engine.adapters import Adapter

NOTHING, BEST, LOGITS = range(3)
FAMILIES = {"gemma": 1, "gemma2": 2, "gemma3_text": 3}


@dataclass(frozen=True)
class Config:
    """An architecture, as config.json of the Hugging Face folder tells it."""

    generation: int  # 1, 2 or 3
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    scale: float  # of attention scores
    windows: tuple[int, ...]  # of each layer: how many tokens back it sees, itself included; 0: all
    ropes: tuple[tuple[float, float], ...]  # of each layer: theta, and what positions are divided by
    attention_cap: float  # 0: none
    final_cap: float
    longest: int  # tokens of a prompt and its answer together

    @classmethod
    def read(cls, folder: Path) -> "Config":
        """
        Raises:
            UserError: not a Gemma 1, 2 or 3, or one with something that this engine does not know.
        """
        try:
            raw = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder}/config.json cannot be read: {error}. Give the folder of a Hugging Face model: --base FOLDER"
            ) from None
        raw = raw.get("text_config", raw)
        family = FAMILIES.get(raw.get("model_type", ""))
        if not family:
            raise UserError(f"{folder} holds a '{raw.get('model_type')}', not one of {', '.join(FAMILIES)}")
        layers, head_size = raw["num_hidden_layers"], raw.get("head_dim", 256)
        default_kinds = {
            1: ["full_attention"] * layers,
            2: [("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
            3: [("full_attention" if (i + 1) % 6 == 0 else "sliding_attention") for i in range(layers)],
        }[family]
        kinds = raw.get("layer_types") or default_kinds if family > 1 else default_kinds
        for name in ("attention_bias", "use_bidirectional_attention"):
            if raw.get(name):
                raise UserError(f"{folder}/config.json: {name} is not supported")
        ropes = {kind: _rope(raw, kind, folder) for kind in set(kinds)}
        return cls(
            generation=family,
            vocabulary=raw["vocab_size"],
            hidden=raw["hidden_size"],
            intermediate=raw["intermediate_size"],
            layers=layers,
            heads=raw["num_attention_heads"],
            kv_heads=raw["num_key_value_heads"],
            head_size=head_size,
            eps=raw.get("rms_norm_eps", 1e-6),
            scale=(raw.get("query_pre_attn_scalar", 256) if family > 1 else head_size) ** -0.5,
            windows=tuple(raw.get("sliding_window") or 0 if kind == "sliding_attention" else 0 for kind in kinds),
            ropes=tuple(ropes[kind] for kind in kinds),
            attention_cap=(raw.get("attn_logit_softcapping") or 0.0) if family == 2 else 0.0,
            final_cap=(raw.get("final_logit_softcapping") or 0.0) if family > 1 else 0.0,
            longest=raw.get("max_position_embeddings", 8192),
        )


def _rope(raw: dict[str, Any], kind: str, folder: Path) -> tuple[float, float]:
    """Theta and the factor of `kind` of layers, as transformers 4 and 5 write them."""
    given = raw.get("rope_parameters") or {}
    given = given.get(kind, given)
    scaling = (raw.get("rope_scaling") if kind == "full_attention" else None) or given
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name not in ("default", "linear"):
        raise UserError(f"{folder}/config.json: rotary embeddings of type '{name}' are not supported")
    local = raw.get("model_type") == "gemma3_text" and kind == "sliding_attention"
    theta = raw.get("rope_local_base_freq", 10_000.0) if local else raw.get("rope_theta")
    if theta is None:
        theta = 1_000_000.0 if raw.get("model_type") == "gemma3_text" else 10_000.0
    return float(given.get("rope_theta", theta)), float(scaling.get("factor", 1.0)) if name == "linear" else 1.0


def norms_of(config: Config) -> list[str]:
    """The RMS norms of a layer."""
    names = ["input_layernorm", "post_attention_layernorm"]
    names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if config.generation > 1 else []
    return names + (["self_attn.q_norm", "self_attn.k_norm"] if config.generation > 2 else [])


@dataclass
class Rows:
    """One request's share of a step: tokens that follow each other.

    Attributes:
        first: the index of its first token in the step.
        count: how many tokens.
        start: the position of the first; so many keys and values lie in the cache already.
        blocks: of the cache, in the order of positions.
        wanted: after its last token: NOTHING, BEST (the most likely token), or LOGITS too.
        adapter: None: the base.
    """

    first: int
    count: int
    start: int
    blocks: Sequence[int]
    wanted: int = NOTHING
    adapter: "Adapter | None" = None


class Weights:
    """Tensors of a Hugging Face folder by the end of their name, one at a time: `weights["layers.0.mlp.up_proj"]`."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} has no *.safetensors. Give the folder of a Hugging Face model: --base FOLDER")
        self.places: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, "pt")
            except Exception as error:  # of safetensors' own class, or of the system
                raise UserError(f"{file} cannot be read: {error}") from None
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                self.places[self._short(name)] = opened, name

    @staticmethod
    def _short(name: str) -> str:
        """Without what wrappers put before it: `model.language_model.layers…`, `language_model.model.layers…`."""
        for start in ("layers.", "embed_tokens.", "norm."):
            at = name.find(start)
            if at == 0 or (at > 0 and name[at - 1] == "." and "vision" not in name[:at]):
                return name[at:].removesuffix(".weight")
        return name

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.places:
            raise UserError(f"{self.folder} has no tensor …{name}.weight: it is not a whole Gemma")
        opened, full = self.places[name]
        return opened.get_tensor(full).to(self.device, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)


class Model(Protocol):
    """A Gemma with its cache, ready to make steps."""

    config: Config

    def step(self, tokens: list[int], rows: list[Rows]) -> tuple[list[int], npt.NDArray[np.float32]]:
        """
        Args:
            tokens: of all requests of this step.
            rows: which belong together; they cover `tokens` in order.

        Returns:
            Of rows with `wanted`, after their last token: the most likely token, and [rows, vocabulary] logits; those
            of a row that wants only the best token may be anything.
        """
