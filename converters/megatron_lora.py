"""Converts LoRA between Megatron's fused layers and peft's separate ones.

Each of Megatron's four layers has an adapter, in all layers; all have the same rank and alpha.
alpha / rank · linear_out(linear_in(x)) is added to the layer's output:

| `decoder.layers.N.…` | linear_in | linear_out | peft |
|---|---|---|---|
| `self_attention.linear_qkv.adapter` | [rank, h] | [g·(n/g + 2)·d, rank] | `q_proj`, `k_proj`, `v_proj` |
| `self_attention.linear_proj.adapter` | [rank, n·d] | [h, rank] | `o_proj` |
| `mlp.linear_fc1.adapter` | [rank, h] | [2f, rank] | `gate_proj`, `up_proj` |
| `mlp.linear_fc2.adapter` | [rank, f] | [h, rank] | `down_proj` |

From Megatron, every part takes the shared linear_in as its lora_A, and its rows of linear_out as its lora_B.

To Megatron, the parts' lora_A must be shared. If they are equal in all layers, they are. Otherwise they are stacked,
and each part's lora_B is in its own columns, with zeros in the others':

    linear_in = [A_q; A_k; A_v]        linear_out = join(B_q·[1 0 0], B_k·[0 1 0], B_v·[0 0 1])

of rank 3r (2r if only gate and up are fused). Adapters of lower rank are padded with zeros, and alpha grows with the
rank, so that the scale and every product stay exactly the same; a scale that is not the commonest goes into B.
Converting back removes zeros of this pattern in all layers, those at the end of each adapter, and adapters of zeros
alone, which restores ranks and layers.

NeMo also has a canonical LoRA with separate adapters (`linear_qkv.adapter.adapter_q.linear_in`, …): those are peft's as
they are. DoRA's `weight_magnitude` [out] is divided as linear_out is. The names are those of NeMo 2.7.3,
`nemo/collections/llm/peft/`; its exporter of Llama's adapters divides them as is done here, for Gemma it has none.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from converters.adapter import patterns, target_modules
from converters.checkpoint import Adapter, LazyTensor
from converters.megatron import JOINED, Sizes, join, split, strip_wrappers
from converters.merge_lora import lora_updates
from core.errors import UserError

MEGATRON = re.compile(
    r"decoder\.layers\.(\d+)\.(.+)\.adapter\.(?:adapter_(\w+)\.)?"
    r"(linear_in\.weight|linear_out\.weight|weight_magnitude)"
)
A, B, M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
KINDS = {A: "linear_in.weight", B: "linear_out.weight", M: "weight_magnitude"}
# Settings of a LoraConfig that Megatron does not support.
UNSUPPORTED = (
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
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], alpha: float | None, dropout: float = 0.0
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
        if name.endswith("_extra_state") or not strip_wrappers(name):
            continue
        match = MEGATRON.fullmatch(strip_wrappers(name))
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
    layers, _ = _unstack(layers, rank)
    scale = (rank if alpha is None else alpha) / rank
    layers = _without_padding(layers)
    ranks = {f"model.layers.{n}.{part}": len(kinds[A]) for n, parts in layers.items() for part, kinds in parts.items()}
    largest = max(ranks.values())
    alphas = {layer: _whole(scale * r) for layer, r in ranks.items()}
    peft: dict[str, Any] = {
        "r": largest,
        "lora_alpha": _whole(scale * largest),
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": target_modules(
            ranks, (f"model.layers.{n}.{part}" for n in range(sizes.layers) for part in sizes.linear())
        ),
        "use_dora": any(M in kinds for adapters in layers.values() for kinds in adapters.values()),
    }
    if by_rank := patterns(ranks, largest):
        peft |= {"rank_pattern": by_rank, "alpha_pattern": patterns(alphas, peft["lora_alpha"])}
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


def _whole(number: float) -> float | int:
    """`number`, as an integer if it is one but for rounding."""
    return round(number) if abs(number - round(number)) < 1e-9 * abs(number) else number


def _without_padding(layers: Layers) -> Layers:
    """`layers` without the last ranks that are zero in both A and B, and without what has none left; as it is if all of
    it is zero, or if it is DoRA's, which has an effect without A and B too."""
    found: Layers = {}
    for number, adapters in layers.items():
        for part, kinds in adapters.items():
            used = (kinds[A] != 0).any(1) | (kinds[B] != 0).any(0)
            rank = int(used.nonzero().max()) + 1 if used.any() else 1
            if M in kinds or kinds[B].any():
                cut = {A: kinds[A][:rank].clone(), B: kinds[B][:, :rank].clone()}
                found.setdefault(number, {})[part] = {**kinds, **cut}
    return found or layers


def to_megatron_lora(adapter: Adapter) -> tuple[dict[str, Tensor], int, float]:
    """NeMo 2's names → tensors, for every layer of the model; their rank; their alpha.

    Raises:
        UserError: an adapter without its base's configuration, or with what Megatron has no place for.
    """
    if adapter.config is None:
        raise UserError(
            "Megatron joins q, k and v by the base's configuration: name the folder of the base with base=FOLDER"
        )
    sizes, peft = Sizes.of(adapter.config), adapter.peft
    unsupported = [key for key in UNSUPPORTED if peft.get(key)] + ["bias"] * (peft.get("bias", "none") != "none")
    if unsupported:
        raise UserError(f"Megatron's LoRA has no {unsupported[0]}; merge the adapter into its base instead")
    layers: Layers = defaultdict(dict)
    updates = lora_updates(adapter, Path("the adapter"))
    rank = max(len(update.lora_a) for update in updates.values())
    scale = Counter(update.scale for update in updates.values()).most_common(1)[0][0]
    for layer, update in updates.items():
        place = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", layer)
        if place is None or place[2] not in sizes.linear() or int(place[1]) >= sizes.layers:
            raise UserError(f"Megatron's LoRA has no place for {layer}; merge the adapter into its base instead")
        ratio, more = update.scale / scale, rank - len(update.lora_a)
        b = update.lora_b if ratio == 1 else update.lora_b.float() * ratio
        kinds = {A: pad(update.lora_a, (0, 0, 0, more)), B: pad(b, (0, more))}
        layers[int(place[1])][place[2]] = kinds if update.magnitudes is None else {**kinds, M: update.magnitudes}
    rank = _rank(layers, sizes)
    used = {part for adapters in layers.values() for part in adapters}
    present = {layer: parts for layer, parts in JOINED.items() if used & {*parts}}
    if peft.get("use_dora") and any(
        not {*parts} <= layers[n].keys() for n in range(sizes.layers) for parts in present.values()
    ):
        raise UserError(
            "DoRA is on some layers or some of q, k and v (or gate and up) only, and Megatron has it on all that it "
            "joins; merge the adapter into its base instead: to=merged"
        )
    stacked = {layer for layer, parts in present.items() if any(_differ(found, parts) for found in layers.values())}
    factor = max(len(present[layer]) if layer in stacked else 1 for layer in present)
    tensors = {}
    for number in range(sizes.layers):
        for layer, parts in present.items():
            kinds = _joined(layers.get(number, {}), parts, layer in stacked, rank, factor, sizes)
            tensors.update({f"decoder.layers.{number}.{layer}.adapter.{KINDS[kind]}": kinds[kind] for kind in kinds})
    return _of_one_dtype(tensors), rank * factor, _whole(scale * rank * factor)


def _of_one_dtype(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` in the widest of their dtypes where they differ: a tensor of all layers is one in Megatron."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    return tensors if len(dtypes) == 1 else {name: tensor.float() for name, tensor in tensors.items()}


def _rank(layers: Layers, sizes: Sizes) -> int:
    """The common rank of all adapters.

    Raises:
        UserError: there are none, or they are incomplete, or of shapes that do not fit `sizes`.
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


def _differ(found: Mapping[str, Kinds], parts: Sequence[str]) -> bool:
    """Whether the parts of a fused layer have different lora_A."""
    have = [found[part][A] for part in parts if part in found]
    return 0 < len(have) < len(parts) or not all(torch.equal(have[0], other) for other in have[1:])


def _joined(
    found: Mapping[str, Kinds], parts: Sequence[str], stack: bool, rank: int, factor: int, sizes: Sizes
) -> Kinds:
    """The adapter of one fused layer, of rank · factor; parts missing in `found` are zero."""
    have, shapes = [part for part in parts if part in found], sizes.linear()
    magnitudes = [found[part][M] for part in have if M in found[part]]
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
    """`layers` without the zeros of `to_megatron_lora`, and the factor by which their rank shrinks: 1 if the pattern is
    not complete, as in an adapter that Megatron trained."""
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
                # A and B are both zero: the layer had no adapter there.
                small[number] |= {
                    part: kinds for part, kinds in (pieces or {}).items() if kinds[A].any() or kinds[B].any()
                }
            return {number: adapters for number, adapters in small.items() if adapters}, factor
    return layers, 1


def _pieces(found: Mapping[str, Kinds], parts: Sequence[str], size: int, factor: int) -> dict[str, Kinds] | None:
    """The adapters of `parts` cut to the rank `size`, or None if the rest is not all zero."""
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
