"""Converts LoRA between Megatron's joined layers and peft's separate ones, of NeMo 2 and of Megatron-Bridge.

alpha / rank · linear_out(linear_in(x)) is added to a layer's output; alpha is the same for all adapters:

| `decoder.layers.N.…` | linear_in | linear_out | peft |
|---|---|---|---|
| `self_attention.linear_qkv.adapter` | [rank, h] | [g·(n/g + 2)·d, rank] | `q_proj`, `k_proj`, `v_proj` |
| `self_attention.linear_proj.adapter` | [rank, n·d] | [h, rank] | `o_proj` |
| `mlp.linear_fc1.adapter` | [rank, h] | [2f, rank] | `gate_proj`, `up_proj` |
| `mlp.linear_fc2.adapter` | [rank, f] | [h, rank] | `down_proj` |

From Megatron, every part takes the shared linear_in as its lora_A, and its rows of linear_out as its lora_B.

What megatron_lora_writer adds, so that all adapters have one rank, is taken away again: zeros of its pattern in all
layers, those at the end of each adapter, and adapters of zeros alone.

There is also a canonical LoRA with separate adapters (`linear_qkv.adapter.adapter_q.linear_in`, …): those are peft's as
they are, and Megatron has one of each part or of none. DoRA's `weight_magnitude` [out] is divided as linear_out is. The
names are those of NeMo 2.7.3, `nemo/collections/llm/peft/`; its exporter of Llama's adapters divides them as is done
here, for Gemma it has none.

Experts have for each [rank, in] and [out, rank], or one for all experts of a layer.

Two tensors of `linear_fc1` are not stored in their own order where t > 1 tensor parallel ranks wrote them, by NeMo 2
and Megatron-Bridge 0.6.2. The linear_out of a canonical gate or up is halved on each rank as if it were gate and up:
the first halves of all ranks come first. DoRA's magnitude is not halved, and should be: each rank's gate is followed by
its up. What their own loading with another t gets wrong is put right here (`in_order`). Written is their own order,
which is right for t = 1.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import metadata

from converters.adapter import patterns, target_modules
from converters.byte_ranges import ByteRange
from converters.checkpoint import Adapter, LazyTensor
from converters.distributed import INDEX, read_index
from converters.megatron_layout import strip_wrappers
from converters.megatron_modules import KINDS, ROUTER, A, B, Kinds, Layers, M, Module, common_rank, modules, whole
from core.errors import UserError

MEGATRON = re.compile(
    r"decoder\.layers\.(\d+)\.(.+)\.adapter\.(?:adapter_(\w+)\.)?"
    r"(linear_in\.weight|linear_out\.weight|weight_magnitude)"
)

OF_RANKS = re.compile(r"(?:.*\.)?linear_fc1\.adapter\.(?:adapter_(?:gate|up)\.linear_out\.weight|(weight_magnitude))")


def from_megatron_lora(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], alpha: float | None, dropout: float = 0.0
) -> Adapter:
    """
    Args:
        tensors: by Megatron's names, with each layer's number.
        config: `config.json` of the base.
        alpha: the rank, where it is None.

    Raises:
        UserError: no adapter, one that is not whole, or of other shapes than the base's.
    """
    known = modules(config)
    joined, layers = _read(tensors, known)
    both = {n: {**joined.get(n, {}), **layers.get(n, {})} for n in sorted({*joined, *layers})}
    rank, of_experts = common_rank(both, known, experts=False), common_rank(both, known, experts=True)
    if not rank and not of_experts:
        raise UserError("there is no LoRA in it")
    for number, adapters in joined.items():
        for name, kinds in adapters.items():
            module = known[number][name]
            if module.experts:
                pieces = {kind: [_for_each(kinds[kind], module.experts)] for kind in (A, B)}
            else:
                pieces = {kind: [*module.split(kinds[kind])] for kind in kinds if kind != A}
            for position, part in enumerate(module.parts):
                own = {kind: pieces[kind][position].contiguous() for kind in pieces}
                layers.setdefault(number, {})[part] = {A: kinds[A], **own}
    layers = {number: layers[number] for number in sorted(layers)}
    if rank and not of_experts:
        layers = _unstack(layers, known, rank)
    scales = {True: _scale(alpha, of_experts), False: _scale(alpha, rank)}
    return _as_peft(_without_padding(layers), scales, dropout, config, known)


def _read(tensors: Mapping[str, LazyTensor], known: Sequence[Mapping[str, Module]]) -> tuple[Layers, Layers]:
    """The adapters of Megatron's layers, and those of parts of them, as far as Hugging Face has the parts."""
    joined: Layers = defaultdict(dict)
    layers: Layers = defaultdict(dict)
    named = {theirs: ours for ours, theirs in KINDS.items()}
    for name, lazy in tensors.items():
        if name.endswith("_extra_state") or not strip_wrappers(name):
            continue
        match = MEGATRON.fullmatch(strip_wrappers(name))
        module = known[int(match[1])].get(match[2]) if match and int(match[1]) < len(known) else None
        if match and match[2] == ROUTER:
            raise UserError(
                f"{name} adapts what goes into the router before its norm, peft what comes out of the norm: no LoRA of "
                f"peft computes the same"
            )
        if not match or not module:
            raise UserError(f"{name} is no part of a LoRA of this Gemma")
        into: Layers = joined
        layer = match[2]
        if match[3]:  # canonical: adapter_q of linear_qkv is q_proj's
            into = layers
            layer = next((part for part in module.parts if part.endswith(f".{match[3]}_proj")), "")
            if not layer and module.groups and match[3] in "kv":
                continue  # of keys or values that Hugging Face does not have
            if not layer:
                raise UserError(f"{name} is no part of a LoRA of this Gemma")
        elif len(module.parts) == 1 and not module.groups and not module.experts:
            into, layer = layers, next(iter(module.parts))
        into[int(match[1])].setdefault(layer, {})[named[match[4]]] = lazy.read()
    return joined, layers


def _for_each(tensor: Tensor, experts: int) -> Tensor:
    """An adapter of `experts`, [experts, …], from one that they may share."""
    return tensor.expand(experts, *tensor.shape) if tensor.dim() == 2 else tensor


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None or not rank else alpha / rank


def _as_peft(
    layers: Layers,
    scales: Mapping[bool, float],
    dropout: float,
    config: Mapping[str, Any],
    known: Sequence[Mapping[str, Module]],
) -> Adapter:
    """peft's settings and tensors of `layers`; `scales` of experts and of all others."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    for number, adapters in layers.items():
        both = sum(part.startswith("experts.") for part in adapters) == 2
        for part, kinds in sorted(adapters.items()):
            place, expert = f"model.layers.{number}.{part}", part.startswith("experts.")
            ranks[place] = kinds[A].shape[-2]
            alphas[place] = whole(scales[expert] * ranks[place])
            prefix = f"base_model.model.{place}"
            if expert:
                inner = ".base_layer" if both and part.endswith("gate_up_proj") else ""
                prefix = f"base_model.model.model.layers.{number}.experts{inner}"
                kinds = {
                    A: _for_each(kinds[A], len(kinds[B])).flatten(0, 1),
                    B: kinds[B].permute(1, 2, 0).flatten(1).contiguous(),
                }
            tensors |= {f"{prefix}.{kind}": tensor for kind, tensor in sorted(kinds.items())}
    largest = max(ranks.values())
    # The default is that of a layer with the largest rank; others are named.
    alpha = next(alphas[place] for place in ranks if ranks[place] == largest)
    every = [f"model.layers.{n}.{part}" for n, own in enumerate(known) for m in own.values() for part in m.parts]
    peft: dict[str, Any] = {
        "r": largest,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": target_modules(_without_experts(ranks), _without_experts(every)),
        "use_dora": any(M in kinds for adapters in layers.values() for kinds in adapters.values()),
    }
    if adapted := [place for place in ranks if ".experts." in place]:
        peft["target_parameters"] = target_modules(adapted, every)
    by_rank, by_alpha = patterns(ranks, largest), patterns(alphas, alpha)
    if by_rank or by_alpha:
        peft |= {"rank_pattern": by_rank, "alpha_pattern": by_alpha}
    return Adapter(peft, tensors, config=dict(config))


def _without_experts(layers: Iterable[str]) -> list[str]:
    return [layer for layer in layers if ".experts." not in layer]


def _without_padding(layers: Layers) -> Layers:
    """`layers` without the last ranks that are zero in both A and B, and without what has none left; as it is if all of
    it is zero, or if it is DoRA's, which has an effect without A and B too."""
    found: Layers = {}
    for number, adapters in layers.items():
        # peft names the tensors of experts by how many of their two matrices have an adapter: both go, or none.
        experts = any(kinds[B].any() for part, kinds in adapters.items() if part.startswith("experts."))
        for part, kinds in adapters.items():
            used = (kinds[A] != 0).any(-1) | (kinds[B] != 0).any(-2)  # of experts for each
            used = used.any(0) if used.dim() > 1 else used
            rank = int(used.nonzero().max()) + 1 if used.any() else 1
            if M in kinds or (experts if part.startswith("experts.") else kinds[B].any()):
                cut = {A: kinds[A][..., :rank, :].clone(), B: kinds[B][..., :rank].clone()}
                found.setdefault(number, {})[part] = {**kinds, **cut}
    return found or layers


def _unstack(layers: Layers, known: Sequence[Mapping[str, Module]], rank: int) -> Layers:
    """`layers` without the zeros of `to_megatron_lora`; as they are if the pattern is not complete, as in an adapter
    that Megatron trained."""
    trained = any(kinds[B].any() for adapters in layers.values() for kinds in adapters.values())
    for factor in (3, 2):
        if rank % factor or not trained:
            continue
        small: Layers = {number: {} for number in layers}
        pairs = [
            (number, _pieces(adapters, [*module.parts], rank // factor, factor))
            for number, adapters in layers.items()
            for module in known[number].values()
        ]
        if all(pieces is not None for _, pieces in pairs):
            for number, pieces in pairs:
                # A and B are both zero: the layer had no adapter there.
                small[number] |= {
                    part: kinds for part, kinds in (pieces or {}).items() if kinds[A].any() or kinds[B].any()
                }
            return {number: adapters for number, adapters in small.items() if adapters}
    return layers


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


def in_order(tensors: Mapping[str, LazyTensor], parts: Mapping[str, ByteRange], ranks: int) -> dict[str, LazyTensor]:
    """`tensors` of a checkpoint with those in their own order that `ranks` tensor parallel ranks wrote in another.

    Args:
        parts: the files of the checkpoint, whose index says how its tensors were divided.
    """
    found, pieces = dict(tensors), {}
    if ranks > 1 and INDEX in parts:
        for key, entry in read_index(parts[INDEX]).state_dict_metadata.items():
            if isinstance(entry, metadata.TensorStorageMetadata) and (match := OF_RANKS.fullmatch(key)):
                axis = len(entry.size) - (1 if match[1] else 2)
                pieces[_plain(key)] = len({chunk.offsets[axis] for chunk in entry.chunks})
    for name, lazy in tensors.items():
        match = OF_RANKS.fullmatch(name)
        divided = pieces.get(_plain(name), 0) == (ranks if match and match[1] else 2 * ranks)
        if match and divided and not lazy.shape[0] % (2 * ranks):
            sizes = (ranks, 2) if match[1] else (2, ranks)
            found[name] = replace(lazy, read=partial(_swapped, lazy, sizes))
    return found


def _plain(name: str) -> str:
    """`name` without wrappers and without the number of its layer, which not all checkpoints have."""
    return re.sub(r"\blayers\.\d+\.", "layers.", re.sub(r"^((model|module|language_model)\.)+", "", name))


def _swapped(lazy: LazyTensor, sizes: tuple[int, int]) -> Tensor:
    return lazy.read().unflatten(0, (*sizes, -1)).transpose(0, 1).flatten(0, 2).contiguous()
