"""What a training run will need, said before it starts: a refusal with advice costs less than a run that dies.

Parameters are counted exactly, on the model built without memory (torch's meta device). Activations are the tensors
that a layer keeps for its backward pass, summed over the architecture; they grow with the tokens in memory at once.
Three constants are measured, on Gemma 3 270M with a CPU: `python -m benchmarks.memory` compares what comes of them.
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
from omegaconf import DictConfig
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from core.configuration import plain
from core.errors import UserError
from core.load_model import add_lora
from training.batches import Batches
from training.cross_entropy import BLOCK

GIB = 2**30
PROCESS = 1.22 * GIB  # Python, NeMo, the tokenizer, and the kernels that oneDNN keeps; a GPU holds none of it
# Over what is kept: gradients and temporary results, in peft's own layers in float32, and gaps in the heap, more where
# packs differ in length (1.0 times with rows of 4096, 1.5 times with packs of 1,000 to 1,500 tokens).
BACKWARD, BACKWARD_OF_PEFT = 1.18, 1.5
# Bytes a weight: 4 bits, an 8-bit scale for 64 of them, a 32-bit one for 256 of those.
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass
class Estimate:
    """Bytes at the peak of a training step, in each of the processes that share the work."""

    process: float
    weights: float
    adapter: float  # float32, with its gradient; of several processes, with the message that sums gradients
    optimizer: float  # two moments in float32
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in asdict(self).items() if size)
        return f"{self.total / GIB:.1f} GiB ({parts})"


def check_memory(config: DictConfig, base_folder: Path, rows: Dataset, dtype: torch.dtype) -> float:
    """Say what training will need, in GiB, and return it.

    Raises:
        UserError: it is more than the machine has free, or `config.peft` does not fit the model.
    """
    settings = config.task.train
    batches = Batches(
        rows,
        settings.batch_size * settings.accumulation,
        config.trainer.micro_batch_tokens,
        config.seed,
        world_size=config.trainer.devices * config.trainer.num_nodes,
    )
    tokens, learned = largest_micro_batch(batches)
    need = estimate(config, base_folder, dtype, tokens, learned)
    free = free_memory(config.trainer.accelerator)
    print(f"Memory: training needs about {need}; {free / GIB:.1f} GiB are free", flush=True)
    if need.total > free:
        advice = []
        if not config.peft.quantization:
            advice.append("PEFT=qlora")
        if not settings.gradient_checkpointing:
            advice.append('ARGS="task.train.gradient_checkpointing=true"')
        advice.append(f'ARGS="trainer.micro_batch_tokens={max(max(rows["length"]), tokens // 4)}"')
        raise UserError(
            f"training would need {need}, and {free / GIB:.1f} GiB are free. Less is needed with "
            f"{', '.join(advice)} or a smaller MODEL; then give the command again"
        )
    return need.total / GIB


def largest_micro_batch(batches: Batches) -> tuple[int, int]:
    """The most tokens, padding included, and the most learned ones, of the first 50 steps: rows are drawn by chance."""
    parts = [part for step in islice(batches, 50) for part in step.micro_batches]
    return max(part.input_ids.numel() for part in parts), max(len(part.targets) for part in parts)


def estimate(config: DictConfig, base_folder: Path, dtype: torch.dtype, tokens: int, learned: int) -> Estimate:
    """
    Args:
        dtype: of the base model's weights.
        tokens, learned: in one micro-batch, padding included.

    Raises:
        UserError: `config.peft` does not fit the model.
    """
    architecture = AutoConfig.from_pretrained(base_folder).get_text_config()
    trainer, layers = config.trainer, architecture.num_hidden_layers
    processes = trainer.devices * trainer.num_nodes
    settings = {
        key: value for key, value in plain(config.peft).items() if key not in ("name", "quantization", "optimizer")
    }
    base = _without_memory(architecture, dtype)
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
        weights += linear * (FOUR_BITS - dtype.itemsize)
    if trainer.strategy == "fsdp2" and processes > 1:  # its share; whole the embedding, a layer, and the next one
        weights = weights / processes + (weights - in_layers) + 2 * in_layers / layers
    elif trainer.strategy == "tp":  # what remains is an architecture of fewer heads and features
        weights -= linear * dtype.itemsize * (1 - 1 / trainer.devices)
        architecture = copy.deepcopy(architecture)
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            setattr(architecture, name, getattr(architecture, name) // trainer.devices)
        with torch.device("meta"):
            model = add_lora(_without_memory(architecture, dtype), settings)
    ours = not (config.peft.use_dora or config.peft.lora_dropout)  # else peft's own layers, see fast_layers, four_bit
    kept = tokens * layer_bytes(architecture, model, dtype, ours)
    if config.peft.use_dora:  # each layer's weights in float32, with its adapter added
        kept += 4 * linear / layers
    if config.task.train.gradient_checkpointing:  # one layer's, and every layer's input
        kept += tokens * (layers - 1) * architecture.hidden_size * dtype.itemsize
    else:
        kept *= layers
    return Estimate(
        process=PROCESS if config.trainer.accelerator == "cpu" else 0,
        weights=weights,
        adapter=(8 if processes == 1 else 12) * adapter,
        optimizer=8 * adapter,
        activations=kept * (BACKWARD if ours else BACKWARD_OF_PEFT),
        logits=learned * (BLOCK * (8 + dtype.itemsize) + 4 * architecture.hidden_size),
    )


def _without_memory(architecture: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, dtype=dtype)


def layer_bytes(architecture: PretrainedConfig, model: PeftModel, dtype: torch.dtype, ours: bool) -> float:
    """What the backward pass of one layer keeps, in bytes a token; see training/fast_layers.py and packing.py."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    queries = architecture.num_attention_heads * architecture.head_dim
    keys = architecture.num_key_value_heads * architecture.head_dim
    norms = (2 if architecture.model_type == "gemma" else 4) * hidden
    attention = 2 * queries + 3 * keys  # queries and keys as they came and rotated, values
    gated = 2 * inner  # gate and up; their product is the input of down_proj
    elements = norms + attention + gated
    bytes_kept = 0.0
    config: Any = model.peft_config["default"]
    shared = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or ".layers.0." not in name:
            continue
        kind = name.rpartition(".")[2]
        if ours:  # the input as it is, kept once for layers that share it
            group = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}.get(
                kind, kind
            )
            if group not in shared:
                elements += layer.in_features
            shared.add(group)
        else:  # peft's own: its input in float32 for each layer, dropout's factors, DoRA's two summands
            bytes_kept += layer.in_features * (4 + (4 if config.lora_dropout else 0))
            bytes_kept += layer.out_features * (4 + dtype.itemsize) if config.use_dora else 0
    return bytes_kept + elements * dtype.itemsize


def give_back() -> None:
    """Let go of what is no longer used: Lightning's cycles, and what torch and glibc keep of freed memory for this
    process, which after training is a gigabyte in pieces."""
    gc.collect()
    torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's own
        trim(0)


def free_memory(accelerator: str, root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the GPU; of main memory and of the control group's limit the smaller,
    with what the process already holds, since the estimate counts that too."""
    if accelerator != "cpu":
        return torch.cuda.mem_get_info()[0]
    available = _field(root / "proc/meminfo", "MemAvailable:")
    limits = []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:  # version 2, version 1; in a container its own group is at the root
            limits.append(
                int((root / "sys/fs/cgroup" / limit).read_text()) - int((root / "sys/fs/cgroup" / used).read_text())
            )
        except (OSError, ValueError):  # no such version; "max"
            continue
    return min([available, *limits]) + _field(root / "proc/self/status", "VmRSS:")


def _field(file: Path, name: str) -> int:
    return int(file.read_text().partition(name)[2].split()[0]) * 1024
