"""Megatron's linear layers that may have an adapter, and which of Hugging Face's layers each joins.

Of a Gemma 4, which Megatron-Bridge has, `linear_qkv` also has rows for keys and values that Hugging Face does not have
(see megatron_gemma4): nothing reads what an adapter adds there. With experts, the dense MLP is `mlp.shared_experts`,
and `mlp.experts.experts.linear_fc1` and `linear_fc2` are peft's `experts.gate_up_proj` and `down_proj`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from converters.byte_ranges import parsing
from converters.distributed import MOST_LAYERS
from converters.megatron_layout import FAMILIES, FC1, FC2, PROJ, QKV, Sizes, join_qkv
from core.errors import UserError
from core.layer_shapes import LayerShape, layer_shapes

A, B, M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
KINDS = {A: "linear_in.weight", B: "linear_out.weight", M: "weight_magnitude"}
SHARED, EXPERTS, ROUTER = "mlp.shared_experts", "mlp.experts.experts", "mlp.router"

Kinds = dict[str, Tensor]  # lora_A, lora_B and perhaps a magnitude, of one linear layer, or of all experts
Layers = dict[int, dict[str, Kinds]]  # number of a layer → linear layer in it → its adapter


@dataclass(frozen=True)
class Module:
    """A linear layer of Megatron, or that of all experts.

    Attributes:
        parts: Hugging Face's layers that it joins, in their order → [out, in].
        shape: [out, in], with the rows for keys and values that Hugging Face does not have.
        groups: of `linear_qkv`, how many heads of keys and values there are; else 0.
        experts: how many there are; else 0.
    """

    parts: Mapping[str, tuple[int, int]]
    shape: tuple[int, int]
    groups: int = 0
    experts: int = 0

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Megatron's tensor of its parts' `parts`, [out, …] each."""
        if not self.groups:
            return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        missing = parts[0].new_zeros((self.shape[0] - len(parts[0])) // 2, *parts[0].shape[1:])
        query, key, value = [*parts, missing, missing][:3]
        return join_qkv(query, key, value, self.groups)

    def split(self, joined: Tensor) -> Sequence[Tensor]:
        """The inverse of `join`."""
        rows = [out for out, _ in self.parts.values()]
        if not self.groups:
            return joined.split(rows) if len(rows) > 1 else (joined,)
        query, both = rows[0] // self.groups, (self.shape[0] - rows[0]) // self.groups
        pieces = joined.unflatten(0, (self.groups, -1)).split([query, both // 2, both // 2], dim=1)
        return [piece.flatten(0, 1) for piece in pieces[: len(rows)]]


def modules(config: Mapping[str, Any]) -> list[dict[str, Module]]:
    """For each layer Megatron's linear layers that may have an adapter, by their names in it.

    Args:
        config: transformers' `config.json` of a Gemma 1, 2, 3 or 4.
    """
    if config.get("model_type") in FAMILIES:
        Sizes.of(config)
    with parsing("the model's configuration"):
        text = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        if not 0 < text.num_hidden_layers <= MOST_LAYERS:
            raise UserError(f"the model's configuration says that it has {text.num_hidden_layers:,} layers")
        return [_modules(layer) for layer in layer_shapes(text)]


def _modules(layer: LayerShape) -> dict[str, Module]:
    shapes = {name: (out, into) for name, (into, out) in layer.linear().items()}

    def of(*names: str) -> Module:
        parts = {name: shapes[name] for name in names if name in shapes}
        first = next(iter(parts.values()))
        return Module(parts, (sum(out for out, _ in parts.values()), first[1]))

    qkv = of("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    rows = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
    fc1, fc2 = (name.replace("mlp", SHARED) if layer.experts else name for name in (FC1, FC2))
    found = {
        QKV: Module(qkv.parts, (rows, qkv.shape[1]), groups=layer.kv_heads),
        PROJ: of("self_attn.o_proj"),
        fc1: of("mlp.gate_proj", "mlp.up_proj"),
        fc2: of("mlp.down_proj"),
    }
    for (part, (into, out)), name in zip(layer.expert().items(), ("linear_fc1", "linear_fc2"), strict=False):
        found[f"{EXPERTS}.{name}"] = Module({part: (out, into)}, (out, into), experts=layer.experts)
    return found


def common_rank(layers: Layers, known: Sequence[Mapping[str, Module]], experts: bool) -> int:
    """The common rank of all adapters of experts, or of all others; 0 if there are none.

    Raises:
        UserError: they are incomplete, or of shapes that do not fit `known`.
    """
    found = []
    for number, adapters in layers.items():
        own = known[number]
        places = {name: (module.shape, module.experts) for name, module in own.items()}
        places |= {part: (shape, module.experts) for module in own.values() for part, shape in module.parts.items()}
        found += [(number, name, kinds, places[name]) for name, kinds in adapters.items()]
    found = [each for each in found if bool(each[3][1]) == experts]
    rank = max((kinds[A].shape[-2] for *_, kinds, _ in found if A in kinds and kinds[A].dim() > 1), default=0)
    for number, name, kinds, ((rows, columns), count) in found:
        expected = {A: (rank, columns), B: (rows, rank), **({M: (rows,)} if M in kinds else {})}
        for kind, shape in expected.items():
            if kind not in kinds:
                raise UserError(f"layer {number}'s adapter of {name} has no {kind}: it is not whole")
            if tuple(kinds[kind].shape) not in (shape, *([(count, *shape)] if count else [])):
                raise UserError(
                    f"layer {number}'s {name}.{kind} has shape {list(kinds[kind].shape)}; by the base's "
                    f"configuration and the other adapters' rank it should be {[count] * bool(count) + list(shape)}"
                )
        if count and M in kinds:
            raise UserError("DoRA on experts is known neither to Megatron nor here")
    return rank


def whole(number: float) -> float | int:
    """`number`, as an integer if it is one but for rounding."""
    return round(number) if abs(number - round(number)) < 1e-9 * abs(number) else number
