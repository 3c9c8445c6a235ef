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
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from core.configuration import plain
from core.errors import UserError
from core.layer_shapes import LayerShape, layer_shapes
from core.load_model import WHOLE_IN_4_BITS, add_lora, lora_settings, per_layer_table
from core.schema import Config
from training.batches import Batches
from training.cross_entropy import BLOCK
from training.distribute import COLUMN_PARALLEL, ROW_PARALLEL
from training.stored_weights import can_store, stored_elements

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
        base_folder: its config.json is read, and the dtypes of its weights.
        dtype: of the base model's weights.
        tokens: of one micro-batch, padding included.
        targets: target tokens of one micro-batch.

    Raises:
        UserError: `config.peft` does not fit the model.
    """
    architecture = AutoConfig.from_pretrained(base_folder).get_text_config()
    processes = config.trainer.devices * config.trainer.num_nodes
    base = _meta_model(architecture, dtype)
    weights = _weights(config, base, dtype)
    divided = processes > 1 and config.trainer.strategy in ("fsdp2", "tp")
    device = torch.device("cpu" if config.trainer.accelerator == "cpu" else "cuda")
    if not config.peft.quantization and not divided and can_store(base_folder, dtype, device):
        weights -= stored_elements(_meta_model(architecture, torch.bfloat16)) * (
            dtype.itemsize - torch.bfloat16.itemsize
        )
    with torch.device("meta"):
        model = add_lora(base, lora_settings(plain(config.peft)))
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Else the layers are peft's own: see fused_layers.py and qlora.py.
    fused = not (config.peft.use_dora or config.peft.lora_dropout)
    return Estimate(
        process=PROCESS if config.trainer.accelerator == "cpu" else 0,
        weights=weights,
        adapter=(8 if processes == 1 else 12) * adapter,
        optimizer=8 * adapter,
        activations=saved_activations(config, model, dtype, tokens, fused) * (BACKWARD if fused else BACKWARD_OF_PEFT),
        logits=targets * (BLOCK * (8 + dtype.itemsize) + 4 * architecture.hidden_size),
    )


def _weights(config: Config, base: PreTrainedModel, dtype: torch.dtype) -> float:
    """Bytes of `base` in each process."""
    trainer, linear = config.trainer, _in_4_bits(base)
    weights: float = sum(weight.numel() for weight in base.parameters()) * dtype.itemsize
    if trainer.table_in_main_memory and trainer.accelerator != "cpu":
        weights -= sum(weight.numel() for weight in per_layer_table(base).parameters()) * dtype.itemsize
    if config.peft.quantization:
        weights += sum(linear.values()) * (NF4_BYTES - dtype.itemsize)
    if trainer.strategy == "fsdp2" and trainer.devices * trainer.num_nodes > 1:
        # Its shard; in full the embeddings, the layer at work and the next one.
        layers = [sum(weight.numel() for weight in layer.parameters()) * dtype.itemsize for layer in base.model.layers]
        two = max(map(sum, zip(layers, [*layers[1:], 0], strict=True)))
        return weights / (trainer.devices * trainer.num_nodes) + (weights - sum(layers)) + two
    if trainer.strategy == "tp":  # some of the heads and features of attention and MLP
        split = sum(size for name, size in linear.items() if name.endswith(COLUMN_PARALLEL + ROW_PARALLEL))
        weights -= split * dtype.itemsize * (1 - 1 / trainer.devices)
    return weights


def saved_activations(config: Config, model: PeftModel, dtype: torch.dtype, tokens: int, fused: bool) -> float:
    """What `tokens` tokens save for the backward pass, in bytes of each process.

    Args:
        model: a text model with its adapters, on any device.
        fused: see `layer_bytes`.
    """
    base, lora = model.get_base_model(), model.peft_config["default"]
    split = config.trainer.devices if config.trainer.strategy == "tp" else 1
    layers = [
        replace(shape, heads=shape.heads // split, kv_heads=shape.kv_heads // split, inner=shape.inner // split)
        for shape in layer_shapes(base.config)
    ]
    saved = []
    for shape, layer in zip(layers, base.model.layers, strict=True):
        adapted = adapted_in(layer)
        # peft adds an update to the weights of all experts at once, and keeps the sum.
        merged = sum(shape.experts * a * b for name, (a, b) in shape.expert().items() if name in adapted)
        saved.append(tokens * layer_bytes(shape, adapted, lora, dtype, fused) + merged * dtype.itemsize)
    if config.peft.use_dora:  # each layer's weights with its adapter added, in float32
        linear = sum(part.base_layer.weight.numel() for part in model.modules() if isinstance(part, LoraLayer))
        saved = [one + 4 * linear / len(layers) for one in saved]
    elements = sum(shape.per_layer_input for shape in layers)  # what the layers add, computed before the first
    if not config.task.train.gradient_checkpointing:
        return sum(saved) + tokens * elements * dtype.itemsize
    # One layer's, every layer's input, and keys and values that later layers borrow.
    elements += (len(layers) - 1) * base.config.hidden_size
    lent = {shape.kv_source for number, shape in enumerate(layers) if shape.kv_source != number}
    elements += sum(2 * layers[number].kv_heads * layers[number].head_dim for number in lent)
    return max(saved) + tokens * elements * dtype.itemsize


def _meta_model(architecture: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, dtype=dtype)


def left_whole(base: PreTrainedModel, dtype: torch.dtype) -> dict[str, float]:
    """What a base of 4-bit layers keeps in `dtype`, in bytes: `embed_tokens`, `experts`, `router`, …"""
    packed = {f"{name}.weight" for name in _in_4_bits(base)}
    found: dict[str, float] = {}
    for name, weight in base.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        what = next((part for part in parts if part in ("experts", "router")), parts[-1])
        if name not in packed and weight.ndim > 1:  # norms are some kilobytes
            found[what] = found.get(what, 0) + weight.numel() * dtype.itemsize
    return found


def _in_4_bits(base: PreTrainedModel) -> dict[str, int]:
    """Name → weights of each linear layer that is in 4 bits if the base is."""
    layers = ((name, layer) for name, layer in base.named_modules() if isinstance(layer, nn.Linear))
    return {name: layer.weight.numel() for name, layer in layers if not name.endswith(WHOLE_IN_4_BITS)}


def adapted_in(layer: nn.Module) -> set[str]:
    """The names of what has an adapter in a decoder layer: `self_attn.q_proj`, `experts.down_proj`, …"""
    return {
        f"experts.{part.parameter_name}" if isinstance(part, ParamWrapper) else name
        for name, part in layer.named_modules()
        if isinstance(part, LoraLayer)
    }


def layer_bytes(
    layer: LayerShape, adapted: Collection[str], lora: LoraConfig, dtype: torch.dtype, fused: bool
) -> float:
    """What one layer saves for its backward pass, in bytes per token; see fused_layers.py and packed_attention.py.

    Args:
        adapted: see `adapted_in`.
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
    experts += layer.active_experts * sum(inputs for name, (inputs, _) in layer.expert().items() if name in adapted)
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
