"""`.nemo` → merged Hugging Face folder: the adapter folded into the base, W' = W + (alpha / r) · B A.

The sum is taken in float32 and rounded to the base's dtype once. Tensors go through one shard at a time, and files
that hold no weights are taken over as they are.
"""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from converters.nemo_file import NemoFile
from nemo_configs.command_line import UserError
from training.base_model import RECORD


def write_merged(nemo: NemoFile, base_folder: Path, folder: Path) -> None:
    """Fill `folder` with the merged model under the base's own file names, tensor names and dtype.

    Raises:
        UserError: the adapter has a kind of layer that does not fold into one matrix, or misses its layer.
    """
    unknown = [name for name in ("use_dora", "bias") if nemo.peft.get(name) not in (None, False, "none")]
    if unknown:
        raise UserError(f"merging adapters with {', '.join(unknown)} is not supported; export --to adapter instead")
    updates = low_rank_pairs(nemo)
    for path in sorted(base_folder.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as shard:
                tensors = {name: merge(shard.get_tensor(name), updates.pop(name, None)) for name in shard.keys()}  # noqa: SIM118
                save_file(tensors, folder / path.name, metadata=shard.metadata())
        elif path.is_file() and path.name != RECORD:
            shutil.copy(path, folder / path.name)
    if updates:
        raise UserError(f"the base has no {sorted(updates)[0]}, which the adapter changes; nothing was written")
    nemo.prompt.save(folder)


def low_rank_pairs(nemo: NemoFile) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Base tensor name → (A [r, in], B [out, r], alpha / r)."""
    rank, alpha = nemo.peft["r"], nemo.peft["lora_alpha"]
    scale = alpha / rank**0.5 if nemo.peft.get("use_rslora") else alpha / rank
    pairs = {}
    for name, tensor in nemo.adapter.items():
        layer, part, _ = name.rsplit(".", 2)  # base_model.model.<layer>.lora_A.weight
        if part == "lora_A":
            weight = f"{layer.removeprefix('base_model.model.')}.weight"
            pairs[weight] = (tensor, nemo.adapter[name.replace("lora_A", "lora_B")], scale)
    return pairs


def merge(weight: Tensor, update: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """`weight` [out, in] with its update folded in, in the dtype of `weight`."""
    if update is None:
        return weight
    lora_a, lora_b, scale = update
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scale).to(weight.dtype)
