"""Merges an adapter into its base: W' = W + s · B A, with s = alpha / r, or alpha / √r for rsLoRA (Kalajdzievski,
2023).

With DoRA (Liu et al., 2024, equation 5) each row of W' is rescaled to its learned magnitude m: m · W' / ‖W'‖. The sum
is computed in float32 and rounded to the base's dtype once, a matrix at a time, when the result is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from converters.adapter import LORA_TENSOR, adapted
from converters.checkpoint import Adapter, Checkpoint, LazyTensor
from core.errors import UserError


@dataclass
class Update:
    """The update of one matrix [out, in]: A [r, in], B [out, r], the scale s, and DoRA's magnitudes m [out] or None.

    Of experts [E, out, in]: A [E, r, in] and B [E, out, r]. `module` is peft's name of what holds A and B.
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    magnitudes: Tensor | None
    module: str = ""


def merge(base: Checkpoint, adapter: Adapter, where: Path) -> Checkpoint:
    """`base` with `adapter`, of the file `where`, merged; each tensor is computed when it is read.

    Raises:
        UserError: the adapter does not fit this base.
    """
    found = lora_updates(adapter, where)
    check_fit(found, base, where)
    tensors = dict(base.tensors)
    for layer, update in found.items():
        name = weight_name(layer)
        weight = base.tensors[name]
        tensors[name] = replace(weight, read=partial(_read_merged, weight, update))
    return Checkpoint(base.config, tensors, base.files, adapter.prompt or base.prompt, whole=base.whole)


def check_base(adapter: Adapter, base: Checkpoint, where: Path) -> None:
    wanted, found = adapter.base.get("sha256"), base.origin.get("sha256")
    if wanted and found and wanted != found:
        raise UserError(
            f"{where} was trained on {adapter.base.get('name')} with weights {wanted[:12]}; the base given is "
            f"{base.origin.get('name')} with weights {found[:12]}. Name the folder of the right one with base=FOLDER"
        )


def check_fit(found: Mapping[str, Update], base: Checkpoint, where: Path) -> None:
    for layer, update in found.items():
        weight = base.tensors.get(weight_name(layer))
        if weight is None and layer.endswith((".qkv_proj", ".mlp.gate_up_proj")):
            raise UserError(
                f"{where} changes {layer}, which joins layers that a Gemma of transformers has one by one; split it in "
                f"the tool that trained it, or merge it there"
            )
        if weight is None:
            raise UserError(f"the base has no {layer}, which {where} changes; name the right base with base=FOLDER")
        shape = (*update.lora_b.shape[:-1], update.lora_a.shape[-1])
        if weight.shape != shape:
            raise UserError(
                f"{where} changes {layer} of shape {list(shape)}, but the "
                f"base's is {list(weight.shape)}; name the right base with base=FOLDER"
            )


def weight_name(layer: str) -> str:
    """The tensor that an update of `layer` changes."""
    return layer if ".experts." in layer else f"{layer}.weight"


def lora_updates(adapter: Adapter, where: Path) -> dict[str, Update]:
    """Linear layer (`model.layers.0.self_attn.q_proj`), or experts (`model.layers.0.experts.down_proj`) → the update.

    Raises:
        UserError: tensors of a layer that are missing, do not fit each other, or are not finite.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        part = LORA_TENSOR.fullmatch(name)
        if part is None:
            raise UserError(f"{where}: {name} is not part of a LoRA on a linear layer of Gemma")
        if not tensor.dtype.is_floating_point or not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} holds values that are not finite numbers")
        layers.setdefault(part[1], {})[part[2]] = tensor
    if not layers:
        raise UserError(f"{where} holds no LoRA")
    updates = {}
    for module, parts in sorted(layers.items()):
        layer = adapted(module, adapter.peft)
        updates[layer] = replace(_update(layer, parts, adapter.peft, where), module=module)
    return updates


def _update(layer: str, parts: dict[str, Tensor], peft: Mapping[str, Any], where: Path) -> Update:
    lora_a, lora_b, magnitudes = (parts.get(part) for part in ("A", "B", "magnitude_vector"))
    if lora_a is None or lora_b is None or (magnitudes is None) == bool(peft.get("use_dora")):
        wanted = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * bool(peft.get("use_dora"))
        raise UserError(f"{where}: {layer} must have {', '.join(wanted)}, and has lora_{', lora_'.join(sorted(parts))}")
    rank = _value(peft, "rank_pattern", layer, peft["r"])
    alpha = _value(peft, "alpha_pattern", layer, peft["lora_alpha"])
    fits = lora_a.dim() == lora_b.dim() == 2 and len(lora_a) == lora_b.shape[1]
    if fits and ".experts." in layer and len(lora_a) and not len(lora_a) % rank:
        lora_a = lora_a.unflatten(0, (-1, int(rank)))
        lora_b = lora_b.unflatten(1, (int(rank), -1)).permute(2, 0, 1)
    if not fits or lora_a.shape[-2] != rank or (magnitudes is not None and magnitudes.shape != lora_b.shape[:1]):
        shapes = ", ".join(f"lora_{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise UserError(f"{where}: {layer} of rank {rank} has {shapes}, which do not fit each other")
    return Update(lora_a, lora_b, alpha / rank**0.5 if peft.get("use_rslora") else alpha / rank, magnitudes)


def _value(peft: Mapping[str, Any], pattern: str, layer: str, default: Any) -> Any:
    values = peft.get(pattern) or {}
    return values.get(get_pattern_key(values.keys(), layer), default)


def _read_merged(weight: LazyTensor, update: Update) -> Tensor:
    return fold(weight.read(), update)


def fold(weight: Tensor, update: Update) -> Tensor:
    """`weight` [out, in] or [experts, out, in] with `update` merged, in the dtype of `weight`."""
    if weight.dim() == 3:  # one at a time in float32
        merged = torch.empty_like(weight)
        for expert, (lora_a, lora_b) in enumerate(zip(update.lora_a, update.lora_b, strict=True)):
            merged[expert] = fold(weight[expert], Update(lora_a, lora_b, update.scale, None))
        return merged
    merged = torch.addmm(weight.float(), update.lora_b.float(), update.lora_a.float(), alpha=update.scale)
    if update.magnitudes is not None:
        merged *= (update.magnitudes.float() / merged.norm(dim=1)).unsqueeze(1)
    return merged.to(weight.dtype)
