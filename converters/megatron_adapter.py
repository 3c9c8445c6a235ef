"""LoRA of Megatron-Bridge: iterations of adapters alone, and the `peft` section of their run_config.yaml.

    peft: {_target_: megatron.bridge.peft.lora.LoRA, target_modules: [linear_qkv, …], dim: 16, alpha: 32, …}

What is computed and how it is divided is in megatron_lora; these are the names of 0.6.2, `megatron/bridge/peft`:

- `lora.LoRA` has one adapter for what Megatron joins, and is written where q, k and v (gate and up) share a lora_A, as
  in all that it trained; `canonical_lora.CanonicalLoRA` has one for each, and is written otherwise. It needs q's, k's
  and v's together: where peft has none, they are zeros. `dora.DoRA` has joined adapters.
- alpha is divided by each adapter's own rank: with `normalize_moe_lora`, experts' is smaller.
- Experts have an adapter each, [experts, …], also where they share it in training; written are those of
  `share_expert_adapters: false`. Older versions and `experts_shared_outer_loras` keep what is shared once.

Dropout before or after the adapter, and how it was initialized, are not of the result.
"""

import re
from collections.abc import Mapping
from typing import Any

from converters.byte_ranges import ByteRange, parsing
from converters.checkpoint import Adapter, LazyTensor, in_memory
from converters.megatron_lora import from_megatron_lora, in_order
from converters.megatron_lora_writer import canonical, collect, fused
from converters.megatron_modules import EXPERTS, SHARED, M
from core.errors import UserError

LORA, CANONICAL, DORA = (
    f"megatron.bridge.peft.{name}" for name in ("lora.LoRA", "canonical_lora.CanonicalLoRA", "dora.DoRA")
)
KNOWN = (LORA, CANONICAL, DORA, "megatron.bridge.peft.lora.VLMLoRA")
PARTS = {"linear_qkv": ("linear_q", "linear_k", "linear_v"), "linear_fc1": ("linear_fc1_up", "linear_fc1_gate")}


def holds_adapter(tensors: Mapping[str, LazyTensor]) -> bool:
    return any(".adapter." in name for name in tensors)


def read_adapter(
    tensors: Mapping[str, LazyTensor],
    parts: Mapping[str, ByteRange],
    run: Mapping[str, Any],
    config: Mapping[str, Any],
    where: str,
) -> Adapter:
    """
    Args:
        tensors: of the checkpoint, by Megatron's names, with each layer's number.
        parts: its files.
        run: its run_config.yaml, with a section `model`.
        config: `config.json` of the base.
        where: the run_config.yaml, for error messages.

    Raises:
        UserError: of another kind than LoRA, canonical LoRA and DoRA; incomplete; of another base.
    """
    settings, model = run.get("peft"), run["model"]
    if not isinstance(settings, Mapping):
        raise UserError(f"{where} does not describe its LoRA: it has no section peft")
    kind = f"{settings.get('_target_')}"
    if kind not in KNOWN:
        raise UserError(f"{where}: peft is {kind[:120]}; LoRA, CanonicalLoRA and DoRA of Megatron-Bridge are converted")
    with parsing(where):
        alpha, dropout = float(settings["alpha"]), float(settings.get("dropout") or 0.0)
        ranks = int(model.get("tensor_model_parallel_size") or 1)
        if not 0 < abs(alpha) <= 65_536 or not 0 <= dropout < 1:
            raise UserError(f"{where}: peft has alpha {alpha:g} and dropout {dropout:g}, which no LoRA has")
    if plain := [name for name in tensors if ".adapter." not in name and re.search(r"\.linear_(in|out)\.weight", name)]:
        raise UserError(
            f"{where}: {plain[0]} adapts a layer that is not divided among GPUs, which Megatron-Bridge itself leaves "
            f"out of an export and is not converted; train without it"
        )
    adapters = {name: lazy for name, lazy in tensors.items() if ".adapter." in name}
    _check_rank(adapters, settings.get("dim"), where)
    adapter = from_megatron_lora(in_order(adapters, parts, ranks), config, alpha, dropout)
    adapter.dtype = "bfloat16" if model.get("bf16") else "float16" if model.get("fp16") else "float32"
    return adapter


def _check_rank(adapters: Mapping[str, LazyTensor], dim: Any, where: str) -> None:
    """
    Raises:
        UserError: `dim` of the section peft is not the rank of the adapters; those of experts may divide it.
    """
    for name, lazy in adapters.items():
        if name.endswith(".linear_in.weight"):
            rank = lazy.shape[-2] if len(lazy.shape) > 1 else 0
            of_experts = EXPERTS in name and isinstance(dim, int) and rank and dim % rank == 0
            if rank != dim and not of_experts:
                raise UserError(f"{where}: peft has dim {str(dim)[:40]}, but {name} has rank {rank}")


def adapter_tensors(adapter: Adapter) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The tensors of `adapter` by Megatron's names, for every layer of its base; the `peft` section that says so.

    Raises:
        UserError: with what Megatron-Bridge has no place for.
    """
    found = collect(adapter)
    joined = not any(found.differ(number, module) for number, _, module in found.present())
    dora = any(M in kinds for own in found.layers.values() for kinds in own.values())
    tensors, rank, alpha = fused(found) if joined or dora else canonical(found)
    kind = DORA if dora else LORA if joined else CANONICAL
    present = sorted({name for _, name, _ in found.present()})
    if kind != LORA and any(name.endswith("mlp.linear_fc1") or name == f"{SHARED}.linear_fc1" for name in present):
        print(
            f"Written as {kind.rpartition('.')[2]} of Megatron-Bridge, whose version 0.6.2 loads gate's and up's part "
            f"with tensor_model_parallel_size=1 alone: with more, it takes other rows"
        )
    settings = {
        "_target_": kind,
        "target_modules": _targets(present, split=kind == CANONICAL),
        "exclude_modules": [],
        "dim": rank,
        "alpha": alpha,
        "dropout": adapter.peft.get("lora_dropout", 0.0),
        "dropout_position": "pre",
        "lora_A_init_method": "xavier",
        "lora_B_init_method": "zero",
    }
    if any(name.startswith(EXPERTS) for name in present):
        settings["share_expert_adapters"] = False
    return {name: in_memory(tensor) for name, tensor in tensors.items()}, settings


def _targets(present: list[str], split: bool) -> list[str]:
    """Megatron-Bridge's `target_modules` for the modules `present`: short names, which mean the dense MLP and the
    experts, unless one of both alone has adapters."""
    places: dict[str, list[str]] = {}
    for name in present:
        place, _, short = name.rpartition(".")
        places.setdefault(short, []).append({EXPERTS: "*.mlp.experts.", SHARED: f"*.{SHARED}."}.get(place, ""))
    of_experts = any(name.startswith((EXPERTS, SHARED)) for name in present)
    found = []
    for short, where in places.items():
        prefix = where[0] if of_experts and len(where) == 1 else ""
        found += [f"{prefix}{part}" for part in (PARTS.get(short, (short,)) if split else (short,))]
    return found
