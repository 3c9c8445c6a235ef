"""KerasHub's LoRA files (`.lora.h5`, of `backbone.save_lora_weights`), to and from peft's adapters.

The file holds `lora/vars/rank` and, for each layer with a LoRA, `lora/<place>/vars/lora_kernel_a` and `lora_kernel_b`.
The place is the layer's index in Keras' traversal of all layers with weights, see `WALK`; it also determines the
family. There is no alpha: the update is A B itself.

With d, f, n, k and h as in `keras`, and rank r:

- `attention_output`: A [n, h, r], B [r, d]; `ffw_*`: A [in, r], B [r, out]. That is peft's LoRA, transposed.
- `query`, `key`, `value`: A [n, d, r] and *one* B [r, h] for all heads. As a matrix of all heads this update has up to
  the rank n·r. Exactly the same in peft: `lora_A` [n·r, d] has the heads' A stacked, and `lora_B` [n·h, n·r] is
  block-diagonal with n copies of Bᵀ.
- A LoRA of peft for those layers is converted in the same way: A [n, d, n·r] has its A once per head, in the
  columns that multiply that head's rows of B [n·r, h]. Both forms are recognized when they are converted back.

All layers of a file have the same rank, and all layers of one name have a LoRA: missing ones are zeros. To load a file
with layers other than query and value, name them: `backbone.enable_lora(rank, target_layer_names=[…])`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor
from torch.nn.functional import pad

from converters import keras_gemma4
from converters.adapter import PREFIX, target_modules
from converters.checkpoint import Adapter
from converters.keras_h5 import dataset, open_h5, tensor_of, write_tensor
from converters.merge_lora import lora_updates
from core.errors import UserError

# Keras' traversal of a decoder layer, in reverse order of creation; None has no LoRA. The embedding comes first.
_MLP = [None, "mlp.down_proj", "mlp.up_proj", "mlp.gate_proj"]  # the layer itself; its MLP
_QKV = ["self_attn.v_proj", "self_attn.k_proj", "self_attn.q_proj"]
WALK: dict[str, list[str | None]] = {
    "gemma": [*_MLP, None, None, "self_attn.o_proj", *_QKV, None],
    "gemma2": [*_MLP, None, None, None, "self_attn.o_proj", *_QKV, None, None],
    "gemma3_text": [*_MLP, None, None, None, "self_attn.o_proj", None, None, *_QKV, None, None],
}
HEADS = {
    "self_attn.q_proj": "num_attention_heads",
    "self_attn.k_proj": "num_key_value_heads",
    "self_attn.v_proj": "num_key_value_heads",
}


def read(path: Path) -> Adapter:
    """
    Raises:
        UserError: damaged, or not the LoRA of a text Gemma.
    """
    with open_h5(path) as file:
        pairs = {place: (_kernel(file, place, "a"), _kernel(file, place, "b")) for place in _places(file, path)}
    fitting = [family for family in WALK if _fits(family, pairs)]
    if len(fitting) != 1:
        raise UserError(f"{path}: the places of its layers ({', '.join(map(str, [*pairs][:4]))} …) are no text Gemma's")
    walk = WALK[fitting[0]]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for place, (a, b) in pairs.items():
        number, part = divmod(place - 1, len(walk))
        lora_a, lora_b = _to_peft(str(walk[part]), *_without_padding(a, b))
        if len(lora_a):
            layer = f"model.layers.{number}.{walk[part]}"
            ranks[layer] = len(lora_a)
            tensors |= {f"{PREFIX}{layer}.lora_A.weight": lora_a, f"{PREFIX}{layer}.lora_B.weight": lora_b}
    if not ranks:
        raise UserError(f"{path} has no effect: its LoRA is all zeros")
    print(f"{path} holds no alpha, as no LoRA of KerasHub does: its updates are taken as they are, A times B")
    return Adapter(_settings(ranks), tensors)


def _places(file: h5py.File, path: Path) -> list[int]:
    group = file.get("lora") if isinstance(file.get("lora", getlink=True), h5py.HardLink) else None
    names = [name for name in group if name != "vars"] if isinstance(group, h5py.Group) else []
    if not names or not all(name.isascii() and name.isdigit() and len(name) < 6 for name in names):
        raise UserError(f"{path} holds no LoRA of KerasHub")
    return sorted(int(name) for name in names)


def _kernel(file: h5py.File, place: int, which: str) -> Tensor:
    found = dataset(file, f"lora/{place}/vars/lora_kernel_{which}")
    if found is None:
        raise UserError(f"{file.filename}: layer {place} has no lora_kernel_{which}")
    return tensor_of(found)


def _fits(family: str, pairs: Mapping[int, tuple[Tensor, Tensor]]) -> bool:
    """Whether every place is one that can have a LoRA, the same in all decoder layers, with fitting shapes."""
    walk = WALK[family]
    names: dict[int, set[str | None]] = {}
    for place, (a, b) in pairs.items():
        number, part = divmod(place - 1, len(walk))
        names.setdefault(number, set()).add(walk[part])
        dimensions = 3 if str(walk[part]).startswith("self_attn") else 2
        if walk[part] is None or (a.dim(), b.dim()) != (dimensions, 2) or a.shape[-1] != len(b):
            return False
    return all(found == names.get(0) for found in names.values()) and sorted(names) == list(range(len(names)))


def _without_padding(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B without trailing ranks that are zero in both."""
    used = (b != 0).any(1) | (a != 0).reshape(-1, a.shape[-1]).any(0)
    rank = int(used.nonzero().max()) + 1 if used.any() else 0
    return a[..., :rank], b[:rank]


def _to_peft(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`lora_A` [r, in] and `lora_B` [out, r] of Keras' A and B."""
    if name not in HEADS:
        return a.flatten(0, -2).T.contiguous(), b.T.contiguous()
    heads, _, rank = a.shape
    if heads > 1 and rank and rank % heads == 0:
        blocks = a.unflatten(2, (heads, -1))  # [n, d, n, r]: of a LoRA of peft
        own = blocks.diagonal(dim1=0, dim2=2)  # [d, r, n]
        if torch.equal(own, own[..., :1].expand_as(own)) and int(blocks.count_nonzero()) == int(own.count_nonzero()):
            return own[..., 0].T.contiguous(), b.unflatten(0, (heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()
    return a.transpose(1, 2).flatten(0, 1).contiguous(), torch.block_diag(*[b.T] * heads).contiguous()


def _from_peft(name: str, lora_a: Tensor, lora_b: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Keras' A and B, the inverse of `_to_peft`."""
    if name not in HEADS:
        shape = (config["num_attention_heads"], config["head_dim"]) if name == "self_attn.o_proj" else lora_a.shape[1:]
        return lora_a.T.unflatten(0, shape), lora_b.T
    heads = config[HEADS[name]]
    parts = lora_b.unflatten(0, (heads, -1))  # [n, h, r]
    rank = len(lora_a)
    if rank % heads == 0:
        blocks = parts.unflatten(2, (heads, -1))  # [n, h, n, r]: of a LoRA of Keras
        own = blocks.diagonal(dim1=0, dim2=2)  # [h, r, n]
        if torch.equal(own, own[..., :1].expand_as(own)) and int(blocks.count_nonzero()) == int(own.count_nonzero()):
            return lora_a.unflatten(0, (heads, -1)).transpose(1, 2), own[..., 0].T
    a = torch.stack([pad(lora_a.T, (head * rank, (heads - 1 - head) * rank)) for head in range(heads)])
    return a, parts.transpose(1, 2).flatten(0, 1)


def _settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """peft's settings with a scale of 1 in every layer."""
    rank = max(ranks.values())
    others = {layer: found for layer, found in ranks.items() if found != rank}
    by_name = {layer.rsplit(".", 1)[1]: found for layer, found in others.items()}
    # With short names if all layers of a name have the same rank.
    if all(by_name.get(layer.rsplit(".", 1)[1], rank) == found for layer, found in ranks.items()):
        others = by_name
    settings = {"r": rank, "lora_alpha": rank, "bias": "none", "target_modules": target_modules(ranks)}
    return settings | ({"rank_pattern": others, "alpha_pattern": dict(others)} if others else {})


def write(adapter: Adapter, target: Path) -> None:
    """
    Raises:
        UserError: the base is not known, or the adapter is no plain LoRA on the layers of a Gemma.
    """
    config = adapter.config or {}
    if config.get("model_type") in keras_gemma4.FAMILIES:
        raise UserError("KerasHub's LoRA of a Gemma 4 is not known here: convert to=merged, and that folder to=keras")
    if config.get("model_type") not in WALK:
        raise UserError("KerasHub's LoRA is ordered by heads; pass the folder of the base, a text Gemma,: base=FOLDER")
    if adapter.peft.get("use_dora"):
        raise UserError("KerasHub has no DoRA: convert to=merged, and that folder to=keras")
    walk = WALK[config["model_type"]]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, update in lora_updates(adapter, target).items():
        _, _, number, name = layer.split(".", 3)
        lora_b = update.lora_b if update.scale == 1 else update.lora_b.float() * update.scale
        found[1 + int(number) * len(walk) + walk.index(name)] = _from_peft(name, update.lora_a, lora_b, config)
    rank = max(len(b) for _, b in found.values())
    # A layer without a LoRA gets one of zeros, if others of its name have one.
    like = {(place - 1) % len(walk): pair for place, pair in found.items()}
    with h5py.File(target, "w") as file:
        file.create_dataset("lora/vars/rank", data=rank)
        for first in range(1, 1 + config["num_hidden_layers"] * len(walk), len(walk)):
            for part, (like_a, like_b) in sorted(like.items()):
                a, b = found.get(first + part, (torch.zeros_like(like_a), torch.zeros_like(like_b)))
                write_tensor(file, f"lora/{first + part}/vars/lora_kernel_a", pad(a, (0, rank - len(b))))
                write_tensor(file, f"lora/{first + part}/vars/lora_kernel_b", pad(b, (0, 0, 0, rank - len(b))))
