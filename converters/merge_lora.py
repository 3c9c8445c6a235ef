"""An adapter folded into its base, W' = W + s · B A, with s = alpha / r, or alpha / √r for rsLoRA (Kalajdzievski 2023).

With DoRA (Liu et al., 2024, equation 5) each row of W' is brought to its learned length m: m · W' / ‖W'‖. All is summed
in float32 and rounded to the base's dtype once, a matrix at a time, when the result is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from converters.adapter import PART
from converters.checkpoint import Adapter, Checkpoint, Lazy
from core.errors import UserError


@dataclass
class Update:
    """What an adapter does to one matrix [out, in]: A [r, in], B [out, r], the scale s, and DoRA's lengths m [out]."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    lengths: Tensor | None


def merge(base: Checkpoint, adapter: Adapter, where: Path) -> Checkpoint:
    """`base` with `adapter`, of the file `where`, folded in; a tensor is computed when it is read.

    Raises:
        UserError: the adapter was trained on another base, by its hash, or does not fit into this one.
    """
    refuse_other_base(adapter, base, where)
    found = updates(adapter, where)
    refuse_misfit(found, base, where)
    tensors = dict(base.tensors)
    for layer, update in found.items():
        name, weight = f"{layer}.weight", base.tensors[f"{layer}.weight"]
        tensors[name] = replace(weight, read=partial(_read_folded, weight, update))
    return Checkpoint(base.config, tensors, base.files, adapter.prompt or base.prompt)


def refuse_other_base(adapter: Adapter, base: Checkpoint, where: Path) -> None:
    wanted, found = adapter.base.get("sha256"), base.origin.get("sha256")
    if wanted and found and wanted != found:
        raise UserError(
            f"{where} was trained on {adapter.base.get('name')} with weights {wanted[:12]}; the base given is "
            f"{base.origin.get('name')} with weights {found[:12]}. Name the folder of the right one with --base"
        )


def refuse_misfit(found: Mapping[str, Update], base: Checkpoint, where: Path) -> None:
    for layer, update in found.items():
        weight = base.tensors.get(f"{layer}.weight")
        if weight is None:
            raise UserError(f"the base has no {layer}, which {where} changes; name the right base with --base")
        if weight.shape != (len(update.lora_b), update.lora_a.shape[1]):
            raise UserError(
                f"{where} changes {layer} of shape {[len(update.lora_b), update.lora_a.shape[1]]}, but the "
                f"base's is {list(weight.shape)}; name the right base with --base"
            )


def updates(adapter: Adapter, where: Path) -> dict[str, Update]:
    """Layer (`model.layers.0.self_attn.q_proj`) → its update.

    Raises:
        UserError: parts of a layer that are missing, do not fit each other, or are not finite.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        part = PART.fullmatch(name)
        if part is None:
            raise UserError(f"{where}: {name} is not part of a LoRA on a linear layer of Gemma")
        if not tensor.dtype.is_floating_point or not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} holds values that are not finite numbers")
        layers.setdefault(part[1], {})[part[2]] = tensor
    if not layers:
        raise UserError(f"{where} holds no LoRA")
    return {layer: _update(layer, parts, adapter.peft, where) for layer, parts in sorted(layers.items())}


def _update(layer: str, parts: dict[str, Tensor], peft: Mapping[str, Any], where: Path) -> Update:
    lora_a, lora_b, lengths = (parts.get(part) for part in ("A", "B", "magnitude_vector"))
    if lora_a is None or lora_b is None or (lengths is None) == bool(peft.get("use_dora")):
        wanted = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * bool(peft.get("use_dora"))
        raise UserError(f"{where}: {layer} must have {', '.join(wanted)}, and has lora_{', lora_'.join(sorted(parts))}")
    rank = _value(peft, "rank_pattern", layer, peft["r"])
    alpha = _value(peft, "alpha_pattern", layer, peft["lora_alpha"])
    fits = lora_a.dim() == lora_b.dim() == 2 and len(lora_a) == lora_b.shape[1] == rank
    if not fits or (lengths is not None and lengths.shape != lora_b.shape[:1]):
        shapes = ", ".join(f"lora_{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise UserError(f"{where}: {layer} of rank {rank} has {shapes}, which do not fit each other")
    return Update(lora_a, lora_b, alpha / rank**0.5 if peft.get("use_rslora") else alpha / rank, lengths)


def _value(peft: Mapping[str, Any], pattern: str, layer: str, default: Any) -> Any:
    values = peft.get(pattern) or {}
    return values.get(get_pattern_key(values.keys(), layer), default)


def _read_folded(weight: Lazy, update: Update) -> Tensor:
    return fold(weight.read(), update)


def fold(weight: Tensor, update: Update) -> Tensor:
    """`weight` [out, in] with `update` folded in, in the dtype of `weight`."""
    merged = torch.addmm(weight.float(), update.lora_b.float(), update.lora_a.float(), alpha=update.scale)
    if update.lengths is not None:
        merged *= (update.lengths.float() / merged.norm(dim=1)).unsqueeze(1)
    return merged.to(weight.dtype)
