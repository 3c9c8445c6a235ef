"""Gemma 4 in Megatron-Bridge's layout (0.6.2, `models/gemma/gemma4_bridge.py` and `modeling_gemma4.py`).

Dense sizes and experts are two models there, with other places for the norms. h is the hidden size, f an MLP's width,
n query heads of size d share g heads of keys and values; full-attention layers have d and g of their own.

| `decoder.layers.N.…` | shape | Hugging Face: `model.layers.N.…` |
|---|---|---|
| `self_attention.linear_qkv.weight` | [(n + 2g)·d, h] | `self_attn.q_proj`, `k_proj`, `v_proj` |
| `mlp.linear_fc1.weight`; of experts `mlp.shared_experts.linear_fc1.weight` | [2f, h] | `mlp.gate_proj`, `up_proj` |
| `mlp.experts.experts.linear_fc1.weight` | [experts, 2f, h] | `experts.gate_up_proj` |

and so on as in `PLACES`. Norms are kept as w itself, not as the w of 1 + w: a Gemma 4 has it so on both sides.

`linear_qkv` has rows for keys and values in every layer, also where Hugging Face has none: where values are the keys
they are a copy of the keys, and where a layer borrows both they are zeros. Nothing computes with them, so that whatever
a training left there is not read. `k_layernorm` of a layer that borrows keys is read by nothing either: ones.

In a checkpoint `self_attention` is `self_attention_sliding` or `self_attention_global`, each a tensor of its own over
the layers of that kind, as their shapes differ. Here all have the name of the table and the number of the layer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from converters.checkpoint import LazyTensor
from converters.distributed import LAYERS, Piece
from converters.layerwise_forward import empty_model
from converters.megatron_layout import EMBEDDING, FC1, FC2, PROJ, QKV, checked, join_qkv, refuse_others
from core.errors import UserError
from core.gemma_config import layer_types
from core.layer_shapes import FULL, SLIDING, LayerShape, layer_shapes

FAMILIES = ("gemma4_text", "gemma4_unified_text")
KINDS = {SLIDING: "self_attention_sliding", FULL: "self_attention_global"}
ATTENTION = re.compile(r"decoder\.layers\.(\d+)\.(self_attention_sliding|self_attention_global)\.(.+)")

# Megatron's tensors outside the layers → Hugging Face's, as far as a model has them.
OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    "per_layer_embedding.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
# Of a layer, but for linear_qkv: Megatron's tensor → Hugging Face's, of every model, of dense ones, of experts.
EVERY = {
    f"{PROJ}.weight": ["self_attn.o_proj.weight"],
    "self_attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
    "self_attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
    "layer_scalar": ["layer_scalar"],
}
DENSE = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "post_self_attn_layernorm.weight": ["post_attention_layernorm.weight"],
    "pre_mlp_layernorm.weight": ["pre_feedforward_layernorm.weight"],
    "post_mlp_layernorm.weight": ["post_feedforward_layernorm.weight"],
    f"{FC1}.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    f"{FC2}.weight": ["mlp.down_proj.weight"],
    "per_layer_input_gate.weight": ["per_layer_input_gate.weight"],
    "per_layer_projection.weight": ["per_layer_projection.weight"],
    "post_per_layer_input_norm.weight": ["post_per_layer_input_norm.weight"],
}
EXPERTS = {
    f"{QKV}.layer_norm_weight": ["input_layernorm.weight"],
    f"{PROJ}.post_layernorm.weight": ["post_attention_layernorm.weight"],
    "pre_shared_expert_layernorm.weight": ["pre_feedforward_layernorm.weight"],
    "mlp.post_shared_expert_layernorm.weight": ["post_feedforward_layernorm_1.weight"],
    "pre_mlp_layernorm.weight": ["pre_feedforward_layernorm_2.weight"],
    "mlp.post_moe_layernorm.weight": ["post_feedforward_layernorm_2.weight"],
    "post_ffn_layernorm.weight": ["post_feedforward_layernorm.weight"],
    "mlp.shared_experts.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.shared_experts.linear_fc2.weight": ["mlp.down_proj.weight"],
    "mlp.router.weight": ["router.proj.weight"],
    "mlp.router.scale": ["router.scale"],
    "mlp.router.per_expert_scale": ["router.per_expert_scale"],
    "mlp.experts.experts.linear_fc1.weight": ["experts.gate_up_proj"],
    "mlp.experts.experts.linear_fc2.weight": ["experts.down_proj"],
}
PADDED = (EMBEDDING, "per_layer_embedding.weight", "output_layer.weight")  # whose rows Megatron may pad


@dataclass(frozen=True)
class Place:
    """A tensor of Megatron, and what it holds.

    Attributes:
        shape: of the whole, nothing padded.
        parts: Hugging Face's tensors in it → their shapes. None: see the module's text on `k_layernorm`.
        attention: of `linear_qkv`, the layer.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, tuple[int, ...]]
    attention: LayerShape | None = None

    def join(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Megatron's tensor of the Hugging Face tensors `parts`, in their order."""
        if not parts:
            return torch.ones(self.shape, dtype=dtype)
        if self.attention is None:
            return parts[0] if len(parts) == 1 else torch.cat(list(parts))
        size = self.attention.kv_heads * self.attention.head_dim
        key = parts[1] if len(parts) > 1 else torch.zeros(size, *self.shape[1:], dtype=dtype)
        return join_qkv(parts[0], key, parts[2] if len(parts) > 2 else key, self.attention.kv_heads)

    def split(self, joined: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `join`; of `linear_qkv` rows for values, or for keys and values, may be missing."""
        if self.attention is None:
            return joined.chunk(len(self.parts))
        groups, head = self.attention.kv_heads, self.attention.head_dim
        grouped = joined.unflatten(0, (groups, -1))
        queries = self.attention.heads // groups * head
        ends = [0, queries, queries + head, queries + 2 * head]
        return tuple(grouped[:, ends[n] : ends[n + 1]].flatten(0, 1) for n in range(len(self.parts)))

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether a `linear_qkv` of this shape has all that is to be read from it."""
        if self.attention is None:
            return shape == self.shape
        heads = self.attention.heads + (len(self.parts) - 1) * self.attention.kv_heads
        known = {(heads + extra * self.attention.kv_heads) * self.attention.head_dim for extra in range(3)}
        return shape[1:] == self.shape[1:] and shape[0] <= self.shape[0] and shape[0] in known


def places(config: Mapping[str, Any]) -> dict[str, Place]:
    """Megatron's name → what it holds, of the Gemma 4 that `config` (transformers' `config.json`) describes."""
    model = empty_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    found = {name: Place(shapes[part], {part: shapes[part]}) for name, part in OUTSIDE.items() if part in shapes}
    for number, layer in enumerate(layer_shapes(model.config)):
        theirs = f"model.layers.{number}."
        qkv = [f"{theirs}self_attn.{part}_proj.weight" for part in "qkv"]
        held = {name: shapes[name] for name in qkv if name in shapes}
        rows = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
        found[f"decoder.layers.{number}.{QKV}.weight"] = Place((rows, layer.hidden), held, layer)
        for name, parts in (EVERY | (EXPERTS if layer.experts else DENSE)).items():
            held = {f"{theirs}{part}": shapes[f"{theirs}{part}"] for part in parts if f"{theirs}{part}" in shapes}
            if held:
                first = next(iter(held.values()))
                found[f"decoder.layers.{number}.{name}"] = Place((len(held) * first[0], *first[1:]), held)
            elif name == "self_attention.k_layernorm.weight":
                found[f"decoder.layers.{number}.{name}"] = Place((layer.head_dim,), {})
    return found


def to_megatron(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Hugging Face's tensors under Megatron's names and in its shapes, nothing padded.

    Raises:
        UserError: a tensor that is missing, too many, or of another shape than `config` says.
    """
    found, usual = {}, tensors["model.norm.weight"].dtype
    for name, place in places(config).items():
        parts = [checked(tensors, part, shape) for part, shape in place.parts.items()]
        dtypes = {part.dtype for part in parts} or {usual}
        if len(dtypes) > 1:
            raise UserError(f"{', '.join(place.parts)} have different dtypes, so that Megatron cannot join them")
        dtype = dtypes.pop()

        def read(place: Place, parts: Sequence[LazyTensor], dtype: torch.dtype) -> Tensor:
            return place.join([part.read() for part in parts], dtype)

        found[name] = LazyTensor(place.shape, dtype, partial(read, place, parts, dtype))
    refuse_others(tensors, {part for place in places(config).values() for part in place.parts})
    return found


def from_megatron(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Megatron's tensors, by the number of the layer, under Hugging Face's names and in its shapes.

    Raises:
        UserError: as `to_megatron`.
    """
    wanted = places(config)

    @lru_cache(maxsize=1)  # q, k and v are read one after another: the tensor that they share is read once
    def parts_of(name: str) -> tuple[Tensor, ...]:
        return wanted[name].split(tensors[name].read())

    def read(name: str, number: int, rows: int) -> Tensor:
        alone = len(wanted[name].parts) == 1 and wanted[name].attention is None
        return tensors[name].read()[:rows] if alone else parts_of(name)[number]

    found = {}
    for name, place in wanted.items():
        if not place.parts:
            continue
        if name not in tensors or not place.holds(tuple(tensors[name].shape)):
            checked(tensors, name, place.shape, padded=name in PADDED)
        for number, (part, shape) in enumerate(place.parts.items()):
            found[part] = LazyTensor(shape, tensors[name].dtype, partial(read, name, number, shape[0]))
    refuse_others(tensors, set(wanted))
    return found


def pieces(weights: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> list[Piece]:
    """`weights` of `to_megatron` under the keys that a checkpoint has them.

    Layers are stacked, those of attention by their kind; where MLPs differ in width, each layer is on its own.
    """
    kinds, alone, found = layer_types(config), bool(config.get("use_double_wide_mlp")), []
    for name, lazy in weights.items():
        match = LAYERS.fullmatch(name)
        if match is None:
            found.append(Piece(name, lazy))
            continue
        number, rest, alike = int(match[2][:-1]), match[3], list(range(len(kinds)))
        if rest.startswith("self_attention."):
            alike = [other for other in alike if kinds[other] == kinds[number]]
            rest = rest.replace("self_attention", KINDS[kinds[number]], 1)
        stacked = Piece(f"{match[1]}{rest}", lazy, alike.index(number), len(alike))
        found.append(Piece(f"{match[1]}{number}.{rest}", lazy) if alone else stacked)
    return found


def number_layers(tensors: Mapping[str, LazyTensor], kinds: Sequence[str]) -> dict[str, LazyTensor]:
    """`tensors` of a checkpoint with attention under the table's name and the layer's number.

    Args:
        kinds: `sliding_attention` or `full_attention` of each layer.

    Raises:
        UserError: the checkpoint has other layers of a kind.
    """
    matches = {name: match for name in tensors if (match := ATTENTION.fullmatch(name))}
    numbers = {}
    for kind, stored in KINDS.items():
        own = [number for number, other in enumerate(kinds) if other == kind]
        there = {int(match[1]) for match in matches.values() if match[2] == stored}
        # A tensor over all layers of a kind counts those alone; tensors that each are of one layer have its number.
        if there and there not in (set(own), set(range(len(own)))):
            raise UserError(f"the checkpoint has {len(there)} layers of {stored}; its configuration has {len(own)}")
        numbers[stored] = dict(zip(own, own, strict=True)) if there == set(own) else dict(enumerate(own))
    found = {}
    for name, lazy in tensors.items():
        match = matches.get(name)
        if match:
            name = f"decoder.layers.{numbers[match[2]][int(match[1])]}.self_attention.{match[3]}"
        found[name] = lazy
    return found
