"""LoRA adapters: PEFT folders, read, and watched while the engine runs."""

import json
import logging
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from core.errors import UserError
from serving.engine.architecture import GemmaConfig, is_of_a_tower

log = logging.getLogger(__name__)
MODULE = r"layers\.(\d+)\.(?:self_attn\.|mlp\.)?((?:router\.)?\w+)|(per_layer_model_projection)"
TENSOR = re.compile(rf"(?:base_model\.model\.)?(.*?(?:{MODULE}))\.lora_([AB])(?:\.\w+)?\.weight")
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
)
versions = count(1)


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter in memory; a replaced folder becomes another object.

    Attributes:
        version: unique, by which the prefix cache tells adapters apart.
        lora_a: (layer, module) → A [rank, in], float32. What the whole model has once is the first layer's.
        lora_b: (layer, module) → B [out, rank], float32, times alpha / rank (or alpha / √rank).
    """

    name: str
    version: int
    lora_a: dict[tuple[int, str], Tensor]
    lora_b: dict[tuple[int, str], Tensor]


def read_adapter(folder: Path, config: GemmaConfig) -> LoraAdapter:
    """Read a PEFT folder, for a base of `config`.

    Args:
        folder: has adapter_config.json and adapter_model.safetensors, as PEFT writes them.

    Raises:
        UserError: it is damaged, is for another base, or uses a feature that this engine does not support.
    """
    try:
        settings = json.loads((folder / "adapter_config.json").read_text())
        if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
            raise UserError(f"{folder}: adapter_config.json does not describe a LoRA")
        if used := [name for name in UNSUPPORTED if settings.get(name)]:
            raise UserError(
                f"{folder}: {used[0]} is not supported by this engine. Merge the adapter into its base, "
                "or serve it with vLLM"
            )
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except UserError:
        raise
    except Exception as error:  # of json, safetensors, the system
        raise UserError(f"{folder} cannot be read as a PEFT adapter: {error}") from None
    lora_a: dict[tuple[int, str], Tensor] = {}
    lora_b: dict[tuple[int, str], Tensor] = {}
    scales: dict[tuple[int, str], float] = {}
    shapes = [module_shapes(config, layer) for layer in range(config.layers)]
    unread: list[str] = []
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        layer, module = (int(match[2] or 0), match[3] or match[4]) if match else (config.layers, "")
        if layer >= config.layers or is_of_a_tower(name):
            raise UserError(f"{folder}: {name} belongs to no linear layer of this base")
        if not config.shapes[layer].has_k_proj and module in ("k_proj", "v_proj"):
            unread.append(name)
            continue
        if module not in shapes[layer]:
            raise UserError(f"{folder}: {name} belongs to no linear layer of this base")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder}: {name} holds values that are not finite")
        assert match
        (lora_a if match[5] == "A" else lora_b)[layer, module] = tensor
        scales[layer, module] = _scale(settings, match[1])
    if unread:
        log.info(
            "keys and values of layers that borrow them are not read",
            extra={"adapter": folder.name, "tensors": len(unread)},
        )
    for key in scales:
        out, into = shapes[key[0]][key[1]]
        a, b = lora_a.get(key), lora_b.get(key)
        if a is None or b is None or a.dim() != 2 or a.shape[1] != into or b.shape != (out, a.shape[0]):
            raise UserError(
                f"{folder}: A and B of layer {key[0]}'s {key[1]} do not fit this base, which is "
                f"[{out}, {into}] there. Was it trained on another?"
            )
        rank = a.shape[0]
        lora_b[key] = b * (scales[key] / (rank**0.5 if settings.get("use_rslora") else rank))
    return LoraAdapter(folder.name, next(versions), lora_a, lora_b)


def module_shapes(config: GemmaConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Name of a linear layer of `layer` → (out, in). What the whole model has once is the first layer's."""
    shape = config.shapes[layer]
    found = {name.removeprefix("self_attn.").removeprefix("mlp."): both for name, both in shape.linear().items()}
    if shape.per_layer_input and not layer:
        found["per_layer_model_projection"] = config.hidden, config.layers * shape.per_layer_input
    return {name: (out, into) for name, (into, out) in found.items()}


def _scale(settings: dict[str, Any], module: str) -> float:
    """The alpha of a module: as in PEFT, `alpha_pattern` overrides it by a suffix or a pattern of the name."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(settings["lora_alpha"])


class AdapterFolder:
    """The adapters in a folder, each under its folder's name. One that cannot be read is reported once.

    Attributes:
        adapters: name → adapter.
        broken: name → why it cannot be served.
    """

    def __init__(self, folder: Path | None, config: GemmaConfig) -> None:
        self.folder, self.config = folder, config
        self.adapters: dict[str, LoraAdapter] = {}
        self.broken: dict[str, str] = {}
        self.seen: dict[str, tuple[Any, ...]] = {}

    def rescan(self) -> None:
        """Load what was added or replaced since the last scan, and drop what was removed."""
        if self.folder is None:
            return
        try:
            found = {
                path.name: _file_state(path) for path in self.folder.iterdir() if path.is_dir() and path.name[0] != "."
            }
        except OSError:
            found = {}
        for name in self.seen.keys() - found.keys():
            del self.seen[name]
            self.broken.pop(name, None)
            if self.adapters.pop(name, None):
                log.info("adapter is gone", extra={"adapter": name})
        for name, state in sorted(found.items()):
            if self.seen.get(name) == state:
                continue
            known = name in self.adapters
            self.seen[name] = state
            self.broken.pop(name, None)
            try:
                self.adapters[name] = read_adapter(self.folder / name, self.config)
                log.info("adapter replaced" if known else "adapter added", extra={"adapter": name})
            except (UserError, MemoryError, RuntimeError) as error:
                self.adapters.pop(name, None)
                self.broken[name] = str(error)
                log.warning("adapter is left out", extra={"adapter": name, "why": str(error)})


def _file_state(path: Path) -> tuple[Any, ...]:
    """What changes when an adapter is replaced."""
    state: list[Any] = []
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        try:
            about = (path / name).stat()
            state += [about.st_ino, about.st_size, about.st_mtime_ns]
        except OSError:
            state.append(None)
    return tuple(state)
