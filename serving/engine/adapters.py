"""LoRA adapters: PEFT folders that are watched while the engine runs, and the stack of those at work in a step.

In a step every adapter's A and B lie one after another in one matrix, so that a batch with many adapters costs two
products where a batch with one costs two: x @ Aᵀ gives the inner values of all adapters, those that are not the row's
own are set to zero, and the rest times B is added. Ranks, alphas, rank-stabilized scaling and target modules may
differ.
"""

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

from serving.engine import UserError
from serving.engine.architecture import Config, Rows

log = logging.getLogger(__name__)
# Products of a layer, and the modules whose outputs lie side by side in each.
SITES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
TENSOR = re.compile(r".*?(layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])(?:\.\w+)?\.weight")
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
class Adapter:
    """One adapter as it was read; a replaced one is another object.

    Attributes:
        version: a number of its own, by which the prefix cache tells adapters apart.
        inner: (layer, module) → A [rank, in]
        outer: (layer, module) → B [out, rank], times alpha / rank
    """

    name: str
    version: int
    inner: dict[tuple[int, str], Tensor]
    outer: dict[tuple[int, str], Tensor]


def read_adapter(folder: Path, config: Config) -> Adapter:
    """
    Args:
        folder: adapter_config.json and adapter_model.safetensors, as PEFT writes them.
        config: of the base it is for.

    Raises:
        UserError: what is wrong with it, or what this engine cannot do.
    """
    try:
        settings = json.loads((folder / "adapter_config.json").read_text())
        if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
            raise UserError(f"{folder}: its adapter_config.json is not that of a LoRA")
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
    inner: dict[tuple[int, str], Tensor] = {}
    outer: dict[tuple[int, str], Tensor] = {}
    scales: dict[tuple[int, str], float] = {}
    shapes = _shapes(config)
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        if not match or match[3] not in shapes or int(match[2]) >= config.layers:
            raise UserError(f"{folder}: {name} belongs to no linear layer of this base")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder}: {name} holds values that are no numbers")
        key = int(match[2]), match[3]
        (inner if match[4] == "A" else outer)[key] = tensor
        scales[key] = _scale(settings, match[1])
    for key in scales:
        out, into = shapes[key[1]]
        a, b = inner.get(key), outer.get(key)
        if a is None or b is None or a.dim() != 2 or a.shape[1] != into or b.shape != (out, a.shape[0]):
            raise UserError(
                f"{folder}: A and B of layer {key[0]}'s {key[1]} do not fit this base, which is "
                f"[{out}, {into}] there. Was it trained on another?"
            )
        rank = a.shape[0]
        outer[key] = b * (scales[key] / (rank**0.5 if settings.get("use_rslora") else rank))
    return Adapter(folder.name, next(versions), inner, outer)


def _shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Module → (outputs, inputs)."""
    queries, values = config.heads * config.head_size, config.kv_heads * config.head_size
    return {
        "q_proj": (queries, config.hidden),
        "k_proj": (values, config.hidden),
        "v_proj": (values, config.hidden),
        "o_proj": (config.hidden, queries),
        "gate_proj": (config.intermediate, config.hidden),
        "up_proj": (config.intermediate, config.hidden),
        "down_proj": (config.hidden, config.intermediate),
    }


def _scale(settings: dict[str, Any], module: str) -> float:
    """Alpha of a module: `alpha_pattern` names those that differ, by the end of their names or a pattern, as PEFT."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", f"model.{module}"):
            return float(alpha)
    return float(settings["lora_alpha"])


class Stack:
    """The adapters of a step, in one matrix a product."""

    def __init__(self, adapters: list[Adapter], config: Config, device: torch.device) -> None:
        self.adapters = adapters
        self.device = device
        self.sites: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}
        shapes = _shapes(config)
        for layer in range(config.layers):
            for site, modules in SITES.items():
                widths = [shapes[module][0] for module in modules]
                inner, outer, owners = [], [], []
                for place, adapter in enumerate(adapters):
                    for number, module in enumerate(modules):
                        if (a := adapter.inner.get((layer, module))) is None:
                            continue
                        b = torch.zeros(a.shape[0], sum(widths))
                        start = sum(widths[:number])
                        b[:, start : start + widths[number]] = adapter.outer[layer, module].T
                        inner.append(a.T)
                        outer.append(b)
                        owners += [place] * a.shape[0]
                if inner:
                    self.sites[layer, site] = (
                        torch.cat(inner, 1).to(device),
                        torch.cat(outer).to(device),
                        torch.tensor(owners, device=device),
                    )

    def of(self, rows: list[Rows]) -> "StackedRows":
        """This stack for the rows of one step."""
        place = {id(one): place for place, one in enumerate(self.adapters)}
        places = [place.get(id(one.adapter), -1) for one in rows for _ in range(one.count)]
        return StackedRows(self, torch.tensor(places, device=self.device))


class StackedRows:
    """A stack, and the adapter of each token of a step."""

    def __init__(self, stack: Stack, places: Tensor) -> None:
        self.sites = stack.sites
        self.places = places[:, None]

    def add(self, y: Tensor, x: Tensor, layer: int, site: str) -> Tensor:
        """y + what each row's adapter makes of x, for one product of one layer."""
        if (layer, site) not in self.sites:
            return y
        inner, outer, owners = self.sites[layer, site]
        return y.addmm_(torch.mm(x, inner).mul_(owners == self.places), outer)


class AdapterFolder:
    """The adapters that stand in a folder, each under its own name. A folder that cannot be read is reported once."""

    def __init__(self, folder: Path | None, config: Config) -> None:
        self.folder, self.config = folder, config
        self.adapters: dict[str, Adapter] = {}
        self.broken: dict[str, str] = {}
        self.seen: dict[str, tuple[Any, ...]] = {}

    def look(self) -> None:
        """See what has been added, replaced and removed since the last look."""
        if self.folder is None:
            return
        try:
            found = {path.name: _state(path) for path in self.folder.iterdir() if path.is_dir() and path.name[0] != "."}
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


def _state(path: Path) -> tuple[Any, ...]:
    """What changes when an adapter is replaced."""
    state: list[Any] = []
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        try:
            about = (path / name).stat()
            state += [about.st_ino, about.st_size, about.st_mtime_ns]
        except OSError:
            state.append(None)
    return tuple(state)
