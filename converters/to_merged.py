"""`.nemo` → merged Hugging Face folder: the adapter folded into the base, W' = W + (alpha / r) · B A.

With DoRA (Liu et al., 2024, equation 5) each row of W' is brought to its learned length m: m · W' / ‖W'‖. All is summed
in float32 and rounded to the base's dtype once. Tensors go through one shard at a time, and files that hold no weights
are taken over as they are.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from converters.nemo_file import NemoFile
from nemo_configs.command_line import UserError
from training.base_model import RECORD


@dataclass
class Update:
    """What an adapter does to one matrix [out, in]: A [r, in], B [out, r], alpha / r, and DoRA's lengths m [out]."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    lengths: Tensor | None


def write_merged(nemo: NemoFile, base_folder: Path, folder: Path) -> None:
    """Fill `folder` with the merged model under the base's own file names, tensor names and dtype.

    Raises:
        UserError: the adapter has a kind of layer that does not fold into one matrix, or misses its layer.
    """
    if nemo.peft.get("bias", "none") != "none":
        raise UserError("merging adapters with biases is not supported; export --to adapter instead")
    updates = read_updates(nemo)
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


def read_updates(nemo: NemoFile) -> dict[str, Update]:
    """Base tensor name → its update."""
    rank, alpha = nemo.peft["r"], nemo.peft["lora_alpha"]
    scale = alpha / rank**0.5 if nemo.peft.get("use_rslora") else alpha / rank
    updates = {}
    for name, tensor in nemo.adapter.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")  # base_model.model.<layer>
            lora_b, lengths = nemo.adapter[f"{layer}.lora_B.weight"], nemo.adapter.get(f"{layer}.lora_magnitude_vector")
            updates[f"{layer.removeprefix('base_model.model.')}.weight"] = Update(tensor, lora_b, scale, lengths)
    return updates


def merge(weight: Tensor, update: Update | None) -> Tensor:
    """`weight` [out, in] with its update folded in, in the dtype of `weight`."""
    if update is None:
        return weight
    merged = torch.addmm(weight.float(), update.lora_b.float(), update.lora_a.float(), alpha=update.scale)
    if update.lengths is not None:
        merged *= (update.lengths.float() / merged.norm(dim=1)).unsqueeze(1)
    return merged.to(weight.dtype)
