"""LoRA on Megatron's joined layers, and peft's on separate ones.

Megatron's four layers have an adapter each, of one rank and alpha for all; alpha / rank · linear_out(linear_in(x)) is
added to what the layer puts out:

| `decoder.layers.N.…` | linear_in | linear_out | peft |
|---|---|---|---|
| `self_attention.linear_qkv.adapter` | [rank, h] | [g·(n/g + 2)·d, rank] | `q_proj`, `k_proj`, `v_proj` |
| `self_attention.linear_proj.adapter` | [rank, n·d] | [h, rank] | `o_proj` |
| `mlp.linear_fc1.adapter` | [rank, h] | [2f, rank] | `gate_proj`, `up_proj` |
| `mlp.linear_fc2.adapter` | [rank, f] | [h, rank] | `down_proj` |

From Megatron every part takes the shared linear_in as its lora_A, and its rows of linear_out as its lora_B.

To Megatron the parts' lora_A must be shared. Where they are the same numbers in all layers, they are. Else they are put
on top of each other, and each part's lora_B stands in its own columns, with zeros in the others':

    linear_in = [A_q; A_k; A_v]        linear_out = join(B_q·[1 0 0], B_k·[0 1 0], B_v·[0 0 1])

of rank 3r (2r if only gate and up are joined). Adapters of lower rank are filled up with zeros, and alpha grows as the
rank does, so that the scale and every product stay exactly what they were. Zeros of this pattern in all layers are
taken off again on the way back, which gives the adapter of rank r that it was.

NeMo also has a canonical LoRA with separate adapters (`linear_qkv.adapter.adapter_q.linear_in`, …): those are peft's as
they are. DoRA's `weight_magnitude` [out] is divided as linear_out is. The names are those of NeMo 2.7.3,
`nemo/collections/llm/peft/`; its exporter of Llama's adapters divides them as is done here, for Gemma it has none.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from converters.checkpoint import Adapter, Lazy
from converters.megatron import JOINED, Sizes, bare, join, split
from core.errors import UserError

PEFT = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)"
)
MEGATRON = re.compile(
    r"decoder\.layers\.(\d+)\.(.+)\.adapter\.(?:adapter_(\w+)\.)?"
    r"(linear_in\.weight|linear_out\.weight|weight_magnitude)"
)
A, B, M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
KINDS = {A: "linear_in.weight", B: "linear_out.weight", M: "weight_magnitude"}
# What of a LoraConfig Megatron has no place for.
BEYOND = (
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
)

Kinds = dict[str, Tensor]  # lora_A, lora_B and perhaps a magnitude, of one linear layer
Layers = dict[int, dict[str, Kinds]]  # number of a layer → linear layer in it → its adapter


def from_megatron_lora(
    tensors: Mapping[str, Lazy], config: Mapping[str, Any], alpha: float | None, dropout: float = 0.0
) -> Adapter:
    """
    Args:
        tensors: by NeMo 2's names.
        config: `config.json` of the base.
        alpha: the rank, where it is None.

    Raises:
        UserError: no adapter, one that is not whole, or of other shapes than the base's.
    """
    sizes = Sizes.of(config)
    found: Layers = defaultdict(dict)
    named = {theirs: ours for ours, theirs in KINDS.items()}
    for name, lazy in tensors.items():
        if name.endswith("_extra_state") or not bare(name):
            continue
        match = MEGATRON.fullmatch(bare(name))
        layer = f"{match[2]}" if match else ""
        if match and match[3]:  # canonical: adapter_q of linear_qkv is q_proj's
            layer = next((part for part in JOINED.get(layer, ()) if part.endswith(f".{match[3]}_proj")), "")
        elif match and len(JOINED.get(layer, ())) == 1:
            layer = JOINED[layer][0]
        if not match or layer not in {*JOINED, *sizes.linear()} or int(match[1]) >= sizes.layers:
            raise UserError(f"{name} is no part of a LoRA of this Gemma")
        found[int(match[1])].setdefault(layer, {})[named[match[4]]] = lazy.read()
    rank = _rank(found, sizes)
    layers: Layers = {number: {} for number in sorted(found)}
    for number, adapters in found.items():
        for layer, kinds in adapters.items():
            parts = JOINED.get(layer, (layer,))
            pieces = {kind: split(kinds[kind], len(parts), sizes) for kind in kinds if kind != A}
            for position, part in enumerate(parts):
                own = {kind: pieces[kind][position].contiguous() for kind in pieces}
                layers[number][part] = {A: kinds[A], **own}
    layers, factor = _unstack(layers, rank)
    scaled = (rank if alpha is None else alpha) / factor
    peft = {
        "r": rank // factor,
        "lora_alpha": int(scaled) if scaled == int(scaled) else scaled,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": _targets(layers, sizes.layers),
        "use_dora": any(M in kinds for adapters in layers.values() for kinds in adapters.values()),
    }
    return Adapter(
        peft,
        {
            f"base_model.model.model.layers.{number}.{part}.{kind}": tensor
            for number, adapters in layers.items()
            for part, kinds in sorted(adapters.items())
            for kind, tensor in sorted(kinds.items())
        },
        config=dict(config),
    )


def to_megatron_lora(adapter: Adapter) -> tuple[dict[str, Tensor], int, float]:
    """NeMo 2's names → tensors, for every layer of the model; their rank; their alpha.

    Raises:
        UserError: an adapter without its base's configuration, or with what Megatron has no place for.
    """
    if adapter.config is None:
        raise UserError(
            "Megatron joins q, k and v by the base's configuration: name the folder of the base with --base"
        )
    sizes, peft = Sizes.of(adapter.config), adapter.peft
    beyond = [key for key in BEYOND if peft.get(key)] + ["bias"] * (peft.get("bias", "none") != "none")
    if beyond:
        raise UserError(f"Megatron's LoRA has no {beyond[0]}; merge the adapter into its base instead")
    layers: Layers = defaultdict(dict)
    for name, tensor in adapter.tensors.items():
        match = PEFT.fullmatch(name)
        if not match or match[2] not in sizes.linear() or int(match[1]) >= sizes.layers:
            raise UserError(f"Megatron's LoRA has no place for {name}; merge the adapter into its base instead")
        layers[int(match[1])].setdefault(match[2], {})[match[3]] = tensor
    rank = _rank(layers, sizes)
    used = {part for adapters in layers.values() for part in adapters}
    present = {layer: parts for layer, parts in JOINED.items() if used & {*parts}}
    stacked = {layer for layer, parts in present.items() if any(_differ(found, parts) for found in layers.values())}
    factor = max(len(present[layer]) if layer in stacked else 1 for layer in present)
    tensors = {}
    for number in range(sizes.layers):
        for layer, parts in present.items():
            kinds = _joined(layers.get(number, {}), parts, layer in stacked, rank, factor, sizes)
            tensors.update({f"decoder.layers.{number}.{layer}.adapter.{KINDS[kind]}": kinds[kind] for kind in kinds})
    scaled = peft["lora_alpha"] * factor
    if peft.get("use_rslora"):
        scaled = peft["lora_alpha"] / math.sqrt(peft["r"]) * rank * factor
    return tensors, rank * factor, scaled


def _rank(layers: Layers, sizes: Sizes) -> int:
    """The rank that all have.

    Raises:
        UserError: they are none, not whole, or of shapes that do not fit `sizes`.
    """
    shapes = sizes.linear()
    shapes |= {layer: (sum(shapes[part][0] for part in parts), shapes[parts[0]][1]) for layer, parts in JOINED.items()}
    rank = max((kinds[A].shape[0] for found in layers.values() for kinds in found.values() if A in kinds), default=0)
    if not rank:
        raise UserError("there is no LoRA in it")
    for number, found in layers.items():
        for layer, kinds in found.items():
            rows, columns = shapes[layer]
            expected = {A: (rank, columns), B: (rows, rank), **({M: (rows,)} if M in kinds else {})}
            for kind, shape in expected.items():
                if kind not in kinds:
                    raise UserError(f"layer {number}'s adapter of {layer} has no {kind}: it is not whole")
                if tuple(kinds[kind].shape) != shape:
                    raise UserError(
                        f"layer {number}'s {layer}.{kind} has shape {list(kinds[kind].shape)}; by the base's "
                        f"configuration and the other adapters' rank it should be {list(shape)}"
                    )
    return rank


def _targets(layers: Layers, count: int) -> list[str]:
    """peft's `target_modules`: a module's name where every layer has it, else its place in each that does."""
    where = defaultdict(list)
    for number, adapters in layers.items():
        for part in adapters:
            where[part].append(number)
    if all(len(numbers) == count for numbers in where.values()):
        return sorted(part.rpartition(".")[2] for part in where)
    return sorted(f"layers.{number}.{part}" for part, numbers in where.items() for number in numbers)


def _differ(found: Mapping[str, Kinds], parts: Sequence[str]) -> bool:
    """Whether the parts of a joined layer have not all the same lora_A."""
    have = [found[part][A] for part in parts if part in found]
    return 0 < len(have) < len(parts) or not all(torch.equal(have[0], other) for other in have[1:])


def _joined(
    found: Mapping[str, Kinds], parts: Sequence[str], stack: bool, rank: int, factor: int, sizes: Sizes
) -> Kinds:
    """The adapter of one joined layer, of rank · factor; parts that `found` has not are zero."""
    have, shapes = [part for part in parts if part in found], sizes.linear()
    magnitudes = [found[part][M] for part in have if M in found[part]]
    if magnitudes and len(magnitudes) < len(parts):
        raise UserError(f"DoRA is on some of {', '.join(parts)} only, and Megatron has it on all that it joins")
    dtype = found[have[0]][A].dtype if have else torch.float32
    linear_in = torch.zeros(rank * factor, shapes[parts[0]][1], dtype=dtype)
    outs = [torch.zeros(shapes[part][0], rank * factor, dtype=dtype) for part in parts]
    for position, part in enumerate(parts):
        if part in found:
            place = slice(position * rank, (position + 1) * rank) if stack else slice(rank)
            linear_in[place] = found[part][A]
            outs[position][:, place] = found[part][B]
    return {A: linear_in, B: join(outs, sizes), **({M: join(magnitudes, sizes)} if magnitudes else {})}


def _unstack(layers: Layers, rank: int) -> tuple[Layers, int]:
    """`layers` without the zeros that `to_megatron_lora` puts in, and by what factor that makes their rank smaller: 1
    where those are not all there, as in an adapter that Megatron trained."""
    trained = any(kinds[B].any() for adapters in layers.values() for kinds in adapters.values())
    for factor in (3, 2):
        if rank % factor or not trained:
            continue
        small: Layers = {number: {} for number in layers}
        pairs = [
            (number, _pieces(adapters, parts, rank // factor, factor))
            for number, adapters in layers.items()
            for parts in JOINED.values()
        ]
        if all(pieces is not None for _, pieces in pairs):
            for number, pieces in pairs:
                # Neither A nor B: the layer had no adapter there.
                small[number] |= {
                    part: kinds for part, kinds in (pieces or {}).items() if kinds[A].any() or kinds[B].any()
                }
            return {number: adapters for number, adapters in small.items() if adapters}, factor
    return layers, 1


def _pieces(found: Mapping[str, Kinds], parts: Sequence[str], size: int, factor: int) -> dict[str, Kinds] | None:
    """The adapters of `parts` cut to the rank `size`; None where what would be cut off is not all zero."""
    shared, stacked = [slice(size)] * len(parts), [slice(n * size, (n + 1) * size) for n in range(len(parts))]
    for places in (shared, *([stacked] if 1 < len(parts) <= factor else [])):
        end, small = max(place.stop for place in places), {}
        for part, place in zip(parts, places, strict=True):
            if part in found:
                a, b = found[part][A], found[part][B]
                if a[end:].any() or b.count_nonzero() != b[:, place].count_nonzero():
                    break
                small[part] = {**found[part], A: a[place].clone(), B: b[:, place].clone()}
        else:
            return small
    return None
