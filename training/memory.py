"""Estimates the memory of a training run before it starts: a refusal with advice costs less than a run that dies.

Parameters are counted exactly, on the model built on torch's meta device. Activations are the tensors that a layer
saves for its backward pass, summed over the architecture; they grow with the tokens of a micro-batch. Three constants
are measured, on Gemma 3 270M with a CPU: `python -m benchmarks.memory` compares estimates with real runs.
"""

import copy
import ctypes
import gc
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from core.configuration import plain
from core.errors import UserError
from core.load_model import add_lora, lora_settings
from core.schema import Config
from training.batches import Batches
from training.cross_entropy import BLOCK

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
    print(f"Memory: training needs about {need}; {free / GIB:.1f} GiB are free", flush=True)
    if need.total > free:
        advice = []
        if not config.peft.quantization:
            advice.append("PEFT=qlora")
        if not settings.gradient_checkpointing:
            advice.append('ARGS="task.train.gradient_checkpointing=true"')
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
    trainer, layers = config.trainer, architecture.num_hidden_layers
    processes = trainer.devices * trainer.num_nodes
    settings = lora_settings(plain(config.peft))
    base = _meta_model(architecture, dtype)
    linear = sum(
        layer.weight.numel()
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    )
    weights: float = sum(weight.numel() for weight in base.parameters()) * dtype.itemsize
    in_layers = sum(weight.numel() for weight in base.model.layers.parameters()) * dtype.itemsize
    with torch.device("meta"):
        model = add_lora(base, settings)
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if config.peft.quantization:
        weights += linear * (NF4_BYTES - dtype.itemsize)
    if (
        trainer.strategy == "fsdp2" and processes > 1
    ):  # its shard; in full the embedding, the layer at work and the next one
        weights = weights / processes + (weights - in_layers) + 2 * in_layers / layers
    elif trainer.strategy == "tp":  # an architecture of fewer heads and features
        weights -= linear * dtype.itemsize * (1 - 1 / trainer.devices)
        architecture = copy.deepcopy(architecture)
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            setattr(architecture, name, getattr(architecture, name) // trainer.devices)
        with torch.device("meta"):
            model = add_lora(_meta_model(architecture, dtype), settings)
    # Else the layers are peft's own: see fused_layers.py and qlora.py.
    fused = not (config.peft.use_dora or config.peft.lora_dropout)
    saved = tokens * layer_bytes(architecture, model, dtype, fused)
    if config.peft.use_dora:  # each layer's weights with its adapter added, in float32
        saved += 4 * linear / layers
    if config.task.train.gradient_checkpointing:  # one layer's, and every layer's input
        saved += tokens * (layers - 1) * architecture.hidden_size * dtype.itemsize
    else:
        saved *= layers
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


def layer_bytes(architecture: PretrainedConfig, model: PeftModel, dtype: torch.dtype, fused: bool) -> float:
    """What one layer saves for its backward pass, in bytes per token; see fused_layers.py and packed_attention.py.

    Args:
        model: of `architecture` with its LoRA layers, on the meta device.
        fused: the layers are fused_layers.py's, not peft's own.
    """
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    queries = architecture.num_attention_heads * architecture.head_dim
    keys = architecture.num_key_value_heads * architecture.head_dim
    norms = (2 if architecture.model_type == "gemma" else 4) * hidden
    attention = 2 * queries + 3 * keys  # queries and keys before and after the rotation, and values
    gated = 2 * inner  # gate and up; their product is the input of down_proj
    elements = norms + attention + gated
    extra_bytes = 0.0
    config: Any = model.peft_config["default"]
    shared = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or ".layers.0." not in name:
            continue
        kind = name.rpartition(".")[2]
        if fused:  # the input in its own dtype, once for layers that share it
            group = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}.get(
                kind, kind
            )
            if group not in shared:
                elements += layer.in_features
            shared.add(group)
        else:  # peft's: the input in float32 for each layer, the dropout mask, DoRA's two terms
            extra_bytes += layer.in_features * (4 + (4 if config.lora_dropout else 0))
            extra_bytes += layer.out_features * (4 + dtype.itemsize) if config.use_dora else 0
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
