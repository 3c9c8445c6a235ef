"""Estimates the memory of a training run before it starts: a refusal with advice costs less than a run that dies.

Parameters are counted exactly, on the model built on torch's meta device. Activations are the tensors that a layer
saves for its backward pass, summed over the architecture; they grow with the tokens of a micro-batch. Three constants
are measured, on Gemma 3 270M with a CPU: `python -m benchmarks.memory` compares estimates with real runs.
"""

import ctypes
import gc
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from core.configuration import plain
from core.errors import UserError
from core.layer_shapes import LayerShape, layer_shapes
from core.load_model import TABLE, WHOLE_IN_4_BITS, add_lora, lora_settings
from core.schema import Config
from training.batches import Batches
from training.cross_entropy import BLOCK
from training.distribute import COLUMN_PARALLEL, ROW_PARALLEL

GIB = 2**30
PROCESS = 1.22 * GIB  # Python, NeMo, the tokenizer and oneDNN's cached kernels; none of it is on a GPU
# Peak over saved activations: gradients and temporaries, in peft's own layers in float32, and heap fragmentation, which
# grows where packs differ in length (1.0 with samples of 4096, 1.5 with packs of 1,000 to 1,500 tokens).
BACKWARD, BACKWARD_OF_PEFT = 1.18, 1.5
# Bytes of a weight in NF4 with double quantization (QLoRA, Dettmers et al., 2023, section 3): 4 bits, an 8-bit scale
# for each 64 weights, a 32-bit scale for each 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass
class Estimate:
    """Peak memory of a training step, in bytes of each process."""

    process: float
    weights: float
    adapter: float  # float32 with its gradient; with several processes also the all-reduce buffer
    optimizer: float  # two moments in float32
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in asdict(self).items() if size)
        return f"{self.total / GIB:.1f} GiB ({parts})"


def check_memory(config: Config, base_folder: Path, samples: Dataset, dtype: torch.dtype) -> float:
    """Print the estimate of training on `samples` with a base in `dtype`, and return it in GiB.

    Raises:
        UserError: it is more than the machine has free, or `config.peft` does not fit the model.
    """
    settings = config.task.train
    batches = Batches(
        samples,
        settings.batch_size * settings.accumulation,
        config.trainer.micro_batch_tokens,
        config.seed,
        world_size=config.trainer.devices * config.trainer.num_nodes,
    )
    tokens, targets = largest_micro_batch(batches)
    need = estimate(config, base_folder, dtype, tokens, targets)
    free = free_memory(config.trainer.accelerator)
    architecture = AutoConfig.from_pretrained(base_folder).get_text_config()
    if config.peft.quantization:
        parts = left_whole(_meta_model(architecture, dtype), dtype).items()
        print(f"QLoRA: whole stay {', '.join(f'{name} {size / GIB:.2f} GiB' for name, size in parts)}")
    print(f"Memory: training needs about {need}; {free / GIB:.1f} GiB are free", flush=True)
    if need.total > free:
        advice = []
        if not config.peft.quantization:
            advice.append("PEFT=qlora")
        if not settings.gradient_checkpointing:
            advice.append('ARGS="task.train.gradient_checkpointing=true"')
        has_table = bool(getattr(architecture, "hidden_size_per_layer_input", 0))
        if has_table and config.trainer.accelerator != "cpu" and not config.trainer.table_in_main_memory:
            advice.append('ARGS="trainer.table_in_main_memory=true"')
        advice.append(f'ARGS="trainer.micro_batch_tokens={max(max(samples["length"]), tokens // 4)}"')
        raise UserError(
            f"training would need {need}, and {free / GIB:.1f} GiB are free. Less is needed with "
            f"{', '.join(advice)} or a smaller MODEL; then run the command again"
        )
    return need.total / GIB


def largest_micro_batch(batches: Batches) -> tuple[int, int]:
    """The largest number of tokens, padding included, and of target tokens of a micro-batch in the first 50 steps,
    which are a random sample."""
    micro_batches = [batch for step in islice(batches, 50) for batch in step.micro_batches]
    return max(batch.input_ids.numel() for batch in micro_batches), max(len(batch.targets) for batch in micro_batches)


def estimate(config: Config, base_folder: Path, dtype: torch.dtype, tokens: int, targets: int) -> Estimate:
    """Peak memory of each process of a run.

    Args:
        base_folder: only its config.json is read.
        dtype: of the base model's weights.
        tokens: of one micro-batch, padding included.
        targets: target tokens of one micro-batch.

    Raises:
        UserError: `config.peft` does not fit the model.
    """
    architecture = AutoConfig.from_pretrained(base_folder).get_text_config()
    layers = layer_shapes(architecture)
    trainer, checkpointing = config.trainer, config.task.train.gradient_checkpointing
    processes = trainer.devices * trainer.num_nodes
    base = _meta_model(architecture, dtype)
    weights: float = sum(weight.numel() for weight in base.parameters()) * dtype.itemsize
    by_layer = [sum(weight.numel() for weight in layer.parameters()) * dtype.itemsize for layer in base.model.layers]
    linear = {name: size for name, size in _linear(base).items() if not name.endswith(WHOLE_IN_4_BITS)}
    with torch.device("meta"):
        model = add_lora(base, lora_settings(plain(config.peft)))
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapted = [
        {name for name, part in layer.named_modules() if isinstance(part, LoraLayer)}
        for layer in model.get_base_model().model.layers
    ]
    if config.trainer.table_in_main_memory and config.trainer.accelerator != "cpu":
        weights -= base.get_submodule(f"model.{TABLE}").weight.numel() * dtype.itemsize
    if config.peft.quantization:
        weights += sum(linear.values()) * (NF4_BYTES - dtype.itemsize)
    if (
        trainer.strategy == "fsdp2" and processes > 1
    ):  # its shard; in full the embedding, the layer at work and the next one
        two = max(map(sum, zip(by_layer, by_layer[1:] or [0], strict=False)))
        weights = weights / processes + (weights - sum(by_layer)) + two
    elif trainer.strategy == "tp":  # fewer heads and features in attention and MLP
        split = sum(size for name, size in linear.items() if name.rpartition(".")[2] in COLUMN_PARALLEL + ROW_PARALLEL)
        weights -= split * dtype.itemsize * (1 - 1 / trainer.devices)
        layers = [
            replace(
                layer,
                heads=layer.heads // trainer.devices,
                kv_heads=layer.kv_heads // trainer.devices,
                inner=layer.inner // trainer.devices,
            )
            for layer in layers
        ]
    # Else the layers are peft's own: see fused_layers.py and qlora.py.
    fused = not (config.peft.use_dora or config.peft.lora_dropout)
    by_layer = [
        tokens * layer_bytes(*layer, model.peft_config["default"], dtype, fused)
        for layer in zip(layers, adapted, strict=True)
    ]
    if config.peft.use_dora:  # each layer's weights with its adapter added, in float32
        by_layer = [saved + 4 * sum(linear.values()) / len(layers) for saved in by_layer]
    if checkpointing:  # one layer's, and every layer's input
        saved = max(by_layer) + tokens * (len(layers) - 1) * architecture.hidden_size * dtype.itemsize
    else:
        saved = sum(by_layer)
    saved += tokens * dtype.itemsize * sum(layer.per_layer_input for layer in layers)  # all that the layers add
    return Estimate(
        process=PROCESS if config.trainer.accelerator == "cpu" else 0,
        weights=weights,
        adapter=(8 if processes == 1 else 12) * adapter,
        optimizer=8 * adapter,
        activations=saved * (BACKWARD if fused else BACKWARD_OF_PEFT),
        logits=targets * (BLOCK * (8 + dtype.itemsize) + 4 * architecture.hidden_size),
    )


def _meta_model(architecture: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, dtype=dtype)


def left_whole(base: PreTrainedModel, dtype: torch.dtype) -> dict[str, float]:
    """What a base of 4-bit layers keeps in `dtype`, in bytes: `embed_tokens`, `experts`, `router`, …"""
    packed = {f"{name}.weight" for name in _linear(base) if not name.endswith(WHOLE_IN_4_BITS)}
    found: dict[str, float] = {}
    for name, weight in base.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        what = next((part for part in parts if part in ("experts", "router")), parts[-1])
        if name not in packed and weight.ndim > 1:  # norms are some kilobytes
            found[what] = found.get(what, 0) + weight.numel() * dtype.itemsize
    return found


def _linear(base: PreTrainedModel) -> dict[str, int]:
    return {name: layer.weight.numel() for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}


def layer_bytes(
    layer: LayerShape, adapted: Collection[str], lora: LoraConfig, dtype: torch.dtype, fused: bool
) -> float:
    """What one layer saves for its backward pass, in bytes per token; see fused_layers.py and packed_attention.py.

    Args:
        adapted: the names of its LoRA layers, e.g. `self_attn.q_proj`.
        fused: the layers are fused_layers.py's, not peft's own.
    """
    queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    norms = (layer.norms + bool(layer.per_layer_input) + 2 * bool(layer.experts)) * layer.hidden
    attention = 2 * queries  # before and after the rotation
    if layer.has_k_proj:  # likewise, and values; those that are not keys also before their norm
        attention += (4 if layer.has_v_norm and layer.has_v_proj else 3) * keys
    gated = 2 * layer.inner  # gate and up; their product is the input of down_proj
    # gate and up of a token's experts, their product with the gate open, and the outputs before they are weighed
    experts = layer.active_experts * (3 * layer.expert_inner + layer.hidden)
    elements = norms + attention + gated + layer.per_layer_input + experts
    extra_bytes = 0.0
    shared = set()
    for name, (inputs, outputs) in layer.linear().items():
        if name not in adapted:
            continue
        kind = name.rpartition(".")[2]
        if fused:  # the input in its own dtype, once for layers that share it
            group = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}.get(
                kind, kind
            )
            if group not in shared:
                elements += inputs
            shared.add(group)
        else:  # peft's: the input in float32 for each layer, the dropout mask, DoRA's two terms
            extra_bytes += inputs * (4 + (4 if lora.lora_dropout else 0))
            extra_bytes += outputs * (4 + dtype.itemsize) if lora.use_dora else 0
    return extra_bytes + elements * dtype.itemsize


def release_memory() -> None:
    """Return unused memory to the system: Lightning's reference cycles, torch's cache, and glibc's free heap, which
    after training is a gigabyte in fragments."""
    gc.collect()
    torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc only
        trim(0)


def free_memory(accelerator: str, root: Path = Path("/")) -> int:
    """Bytes available to this process: of the GPU, or of main memory within the control group's limit.

    Main memory that the process already holds is counted as available, since the estimate includes it.
    """
    if accelerator != "cpu":
        return torch.cuda.mem_get_info()[0]
    available = _field(root / "proc/meminfo", "MemAvailable:")
    limits = []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:  # cgroup 2, cgroup 1; a container sees its own group at the root
            limits.append(
                int((root / "sys/fs/cgroup" / limit).read_text()) - int((root / "sys/fs/cgroup" / used).read_text())
            )
        except (OSError, ValueError):  # no such version; "max"
            continue
    return min([available, *limits]) + _field(root / "proc/self/status", "VmRSS:")


def _field(file: Path, name: str) -> int:
    return int(file.read_text().partition(name)[2].split()[0]) * 1024
