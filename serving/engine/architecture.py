"""The architecture of a Gemma, from config.json, and its weights, from safetensors."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from core.errors import UserError
from core.layer_shapes import FULL, SLIDING, LayerShape, layer_shapes

FAMILIES = {"gemma": 1, "gemma2": 2, "gemma3_text": 3, "gemma4_text": 4, "gemma4_unified_text": 4}
ROPES_OF_4: dict[str, Any] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


class Rope(NamedTuple):
    """Rotary embeddings of one kind of layer.

    Attributes:
        theta: base of the wavelengths.
        factor: divides positions.
        size: features of a head.
        rotated: pairs of features that are rotated, of `size` / 2; the others stay as they are.
    """

    theta: float
    factor: float
    size: int
    rotated: int

    def frequencies(self) -> Tensor:
        """The angle of each pair at position 1, float32 [size / 2]."""
        found = 1.0 / self.theta ** (torch.arange(0, self.size, 2, dtype=torch.float) / self.size) / self.factor
        found[self.rotated :] = 0
        return found


@dataclass(frozen=True)
class GemmaConfig:
    """The sizes and mechanisms of the text model of a Gemma 1, 2, 3 or 4."""

    generation: int  # 1 to 4
    vocabulary: int
    hidden: int
    heads: int
    shapes: tuple[LayerShape, ...]  # of each layer
    eps: float
    scale: float  # of attention scores
    windows: tuple[int, ...]  # of each layer: the sliding window in tokens, the query included; 0: full attention
    ropes: tuple[Rope, ...]  # of each layer
    attention_cap: float  # soft cap of attention scores; 0: none
    final_cap: float  # soft cap of the output logits; 0: none
    max_position_embeddings: int  # tokens of a prompt and its answer together
    suppressed: tuple[int, ...]  # tokens that never are an answer

    @property
    def layers(self) -> int:
        return len(self.shapes)

    @property
    def per_layer_input(self) -> int:
        """Features of the per-layer embedding; 0: none."""
        return self.shapes[0].per_layer_input

    @property
    def norm_shift(self) -> float:
        """What is added to the weights of norms: up to Gemma 3 they are stored less 1."""
        return 0.0 if self.generation == 4 else 1.0

    @property
    def last_own(self) -> int:
        """The last layer that writes keys and values; those after it need only tokens whose output is wanted."""
        return max(number for number, shape in enumerate(self.shapes) if shape.kv_source == number)

    @property
    def cache_bytes_per_token(self) -> int:
        """Of keys and values, float32."""
        own = [shape for number, shape in enumerate(self.shapes) if shape.kv_source == number]
        return sum(2 * 4 * shape.kv_heads * shape.head_dim for shape in own)

    @classmethod
    def read(cls, folder: Path) -> "GemmaConfig":
        """The architecture that the config.json of a Hugging Face folder describes; of a whole model, its text part.

        Raises:
            UserError: not a Gemma 1 to 4, or one with a mechanism that this engine does not implement.
        """
        try:
            raw = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder}/config.json cannot be read: {error}. Pass the folder of a Hugging Face model: --base FOLDER"
            ) from None
        raw = raw.get("text_config", raw)
        family = FAMILIES.get(raw.get("model_type", ""))
        if not family:
            raise UserError(f"{folder} holds a '{raw.get('model_type')}', not one of {', '.join(FAMILIES)}")
        _refuse_unknown(raw, family, folder)
        layers, head_size = raw["num_hidden_layers"], raw.get("head_dim", 256)
        default_kinds = {
            1: [FULL] * layers,
            2: [(SLIDING, FULL)[i % 2] for i in range(layers)],
        }.get(family, [(FULL if (i + 1) % 6 == 0 else SLIDING) for i in range(layers)])
        kinds = raw.get("layer_types") or default_kinds if family > 1 else default_kinds
        if family == 4:
            kinds = [*kinds[:-1], FULL]  # as transformers has it, whatever is written
        shapes = layer_shapes(_described(raw, kinds, head_size, family))
        return cls(
            generation=family,
            vocabulary=raw["vocab_size"],
            hidden=raw["hidden_size"],
            heads=raw["num_attention_heads"],
            shapes=tuple(shapes),
            eps=raw.get("rms_norm_eps", 1e-6),
            scale=1.0 if family == 4 else (raw.get("query_pre_attn_scalar", 256) if family > 1 else head_size) ** -0.5,
            windows=tuple(raw.get("sliding_window") or 0 if kind == SLIDING else 0 for kind in kinds),
            ropes=tuple(_rope(raw, shape, folder) for shape in shapes),
            attention_cap=(raw.get("attn_logit_softcapping") or 0.0) if family == 2 else 0.0,
            final_cap=(raw.get("final_logit_softcapping") or 0.0) if family > 1 else 0.0,
            max_position_embeddings=raw.get("max_position_embeddings", 131_072 if family == 4 else 8192),
            suppressed=_suppressed(folder) if family == 4 else (),
        )


def _refuse_unknown(raw: dict[str, Any], family: int, folder: Path) -> None:
    """
    Raises:
        UserError: a mechanism that this engine does not implement.
    """
    names = ["attention_bias"]
    if family < 4 or raw.get("use_bidirectional_attention") != "vision":  # which changes nothing for text
        names.append("use_bidirectional_attention")
    for name in names:
        if raw.get(name):
            raise UserError(f"{folder}/config.json: {name} is not supported")
    if family == 4:
        for name, value in (("hidden_activation", "gelu_pytorch_tanh"), ("tie_word_embeddings", True)):
            if raw.get(name, value) != value:
                raise UserError(f"{folder}/config.json: {name} {raw[name]} is not supported, only {value}")


def _suppressed(folder: Path) -> tuple[int, ...]:
    """What generation_config.json excludes from answers: of Gemma 4, the tokens that enclose images and sounds."""
    file = folder / "generation_config.json"
    try:
        return tuple(json.loads(file.read_text()).get("suppress_tokens") or ()) if file.exists() else ()
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _described(raw: dict[str, Any], kinds: list[str], head_size: int, family: int) -> SimpleNamespace:
    """`raw` as `layer_shapes` reads it: in Gemma 4 with the heads of each layer, whichever dialect tells them.

    Up to transformers 5.14 two keys give the full-attention layers' own sizes; later ones list each layer that differs,
    by its number, which may be written with zeros before it.
    """
    config = SimpleNamespace(**{**raw, "layer_types": kinds, "head_dim": head_size})
    if family < 4:
        return config
    config.num_kv_shared_layers = raw.get("num_kv_shared_layers") or 0
    if raw["model_type"] == "gemma4_text":
        config.hidden_size_per_layer_input = raw.get("hidden_size_per_layer_input", 256)
    usual = {"head_dim": head_size, "num_key_value_heads": raw["num_key_value_heads"]}
    differing = {int(number): dict(given) for number, given in (raw.get("per_layer_config") or {}).items()}
    if "per_layer_config" not in raw:  # an empty one says that no layer differs
        own = {"head_dim": raw.get("global_head_dim", 512)}
        if raw.get("attention_k_eq_v") and raw.get("num_global_key_value_heads"):
            own["num_key_value_heads"] = raw["num_global_key_value_heads"]
        differing = {number: own for number, kind in enumerate(kinds) if kind == FULL}
    config.per_layer_config = [
        SimpleNamespace(**usual | differing.get(number, {})) for number in range(raw["num_hidden_layers"])
    ]
    return config


def _rope(raw: dict[str, Any], shape: LayerShape, folder: Path) -> Rope:
    """The rotary embeddings of a layer, as transformers 4 or 5 writes them."""
    kind, of_4 = shape.kind, FAMILIES[raw["model_type"]] == 4
    given = raw.get("rope_parameters") or (ROPES_OF_4 if of_4 else {})
    given = given.get(kind, given)
    scaling = (raw.get("rope_scaling") if kind == FULL else None) or given
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name not in ("default", "linear", *(["proportional"] if of_4 else [])):
        raise UserError(f"{folder}/config.json: rotary embeddings of type '{name}' are not supported")
    local = raw.get("model_type") == "gemma3_text" and kind == SLIDING
    theta = raw.get("rope_local_base_freq", 10_000.0) if local else raw.get("rope_theta")
    if theta is None:
        theta = 1_000_000.0 if raw.get("model_type") == "gemma3_text" else 10_000.0
    part = scaling.get("partial_rotary_factor", 1.0) if name == "proportional" else 1.0
    return Rope(
        float(given.get("rope_theta", theta)),
        float(scaling.get("factor", 1.0)) if name != "default" else 1.0,
        shape.head_dim,
        int(part * shape.head_dim // 2),
    )


def norms_of(config: GemmaConfig, layer: int) -> list[str]:
    """The names of a layer's RMS norms that have weights."""
    names, shape = ["input_layernorm", "post_attention_layernorm"], config.shapes[layer]
    names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if config.generation > 1 else []
    if config.generation > 2:
        names += ["self_attn.q_norm", "self_attn.k_norm"] if shape.has_k_proj else ["self_attn.q_norm"]
    if shape.experts:
        names += [f"{name}_feedforward_layernorm_{n}" for name, n in (("post", 1), ("pre", 2), ("post", 2))]
    return names + (["post_per_layer_input_norm"] if shape.per_layer_input else [])


def projections_of(shape: LayerShape) -> str:
    """Which of q, k and v a layer has, in this order."""
    return "q" + "k" * shape.has_k_proj + "v" * shape.has_v_proj


class Weights:
    """The tensors of a Hugging Face folder, read one at a time by a short name: `weights["layers.0.mlp.up_proj"]`.

    Of a whole model, those of the text model; what sees and hears is left out.

    Args:
        dtype, device: of the tensors that it returns.

    Raises:
        UserError: no safetensors, or a tensor that is missing.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} has no *.safetensors. Pass the folder of a Hugging Face model: --base FOLDER")
        self.places: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, "pt")
            except Exception as error:  # of safetensors' own class, or of the system
                raise UserError(f"{file} cannot be read: {error}") from None
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                if not is_of_a_tower(name):
                    self.places[self._short(name)] = opened, name

    @staticmethod
    def _short(name: str) -> str:
        """Without the prefix of a wrapper: `model.language_model.layers…`, `language_model.model.layers…`."""
        for start in ("layers.", "embed_tokens.", "norm.", "embed_tokens_per_layer.", "per_layer_"):
            at = name.find(start)
            if at == 0 or (at > 0 and name[at - 1] == "."):
                return name[at:].removesuffix(".weight")
        return name

    def __getitem__(self, name: str) -> Tensor:
        return self.mapped(name).to(self.device, self.dtype)

    def mapped(self, name: str) -> Tensor:
        """A tensor as the file has it, which is not read before its numbers are."""
        if name not in self.places:
            raise UserError(f"{self.folder} has no tensor …{name}.weight: it is not a complete Gemma")
        opened, full = self.places[name]
        found: Tensor = opened.get_tensor(full)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)


def is_of_a_tower(name: str) -> bool:
    """Whether a tensor or an adapter's module belongs to what sees or hears in a whole model."""
    return "vision" in name or "audio" in name
