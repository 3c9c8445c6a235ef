"""A model of a training step on a cluster: memory, communication and time, by formulas and data sheets.

docs/scaling.md, which benchmarks/scaling.py writes, says where each formula comes from, what is checked against real
runs, and what is assumed.
"""

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from benchmarks.random_base import ARCHITECTURES
from core.arguments import Arguments
from core.configuration import load_config
from core.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """From NVIDIA's data sheets: memory in GiB, and the bytes per second that one GPU sends over NVLink and over its
    network card (DGX: one card per GPU). Its FLOP/s are in training/flops.py."""

    memory: float
    nvlink: float
    network: float


GPUS = {
    "H100": Gpu(80, 450e9, 50e9),  # DGX H100: NVLink 4, 900 GB/s both ways; ConnectX-7, 400 Gb/s
    "H200": Gpu(141e9 / 2**30, 450e9, 50e9),
    "A100": Gpu(80, 300e9, 25e9),  # DGX A100: NVLink 3, 600 GB/s both ways; ConnectX-6, 200 Gb/s
}
# Assumptions: this project has not been measured on a cluster.
# Of the peak, by arithmetic; Narayanan et al. (2021) reach 0.44 to 0.52 of an A100's with all included.
COMPUTE_EFFICIENCY = 0.5
LINK_EFFICIENCY = 0.8  # of a link's nominal bandwidth, by NCCL with large messages
HOP_SECONDS = 5e-6  # latency from one GPU to the next
USABLE_MEMORY = 0.9  # fraction of a GPU's memory; the rest is for CUDA, NCCL and fragmentation

# Name in the table: (trainer.strategy, peft)
STRATEGIES = {"ddp": ("ddp", "lora"), "ddp, qlora": ("ddp", "qlora"), "fsdp2": ("fsdp2", "lora"), "tp": ("tp", "lora")}


class Options(Arguments):
    """The arguments of `python -m benchmarks.scaling`."""

    gpus: list[Annotated[int, Field(ge=1)]] = Field([8, 64, 512], description="numbers of GPUs to plan for")
    gpu: Literal[tuple(GPUS)] = Field("H100", description="their kind")  # type: ignore[valid-type]
    per_node: int = Field(8, ge=1, description="GPUs of a machine")
    step_tokens: int = Field(2**20, ge=1, description="tokens of an optimizer step, over all GPUs")
    length: int = Field(512, ge=1, description="tokens of a sample, half of them target tokens")

    @model_validator(mode="after")
    def _divide_each_other(self) -> Self:
        for gpus in self.gpus:
            if gpus > self.per_node and gpus % self.per_node:
                raise ValueError(f"gpus={gpus} is no multiple of per_node={self.per_node}")
            if self.step_tokens // gpus < self.length:
                raise ValueError(
                    f"step_tokens={self.step_tokens:,} gives each of {gpus} GPUs less than a sample of {self.length}"
                )
        return self


@dataclass(frozen=True)
class Collective:
    """`count` collective operations of one kind in a step, of `size` bytes, among `group` GPUs."""

    kind: str  # all_gather: `size` is of the result; all_reduce: of the input and the result
    count: int
    size: float
    group: int

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends in a ring algorithm (Patarasuk and Yuan, 2009)."""
        passes = {"all_gather": 1, "all_reduce": 2}[self.kind]
        return self.count * passes * self.size * (self.group - 1) / self.group

    def seconds(self, gpu: Gpu, per_node: int) -> float:
        """Bytes over bandwidth plus latency: around the ring, or up and down NCCL's tree.

        A ring enters and leaves each machine once, and NCCL makes as many rings as there are network cards; so between
        machines a GPU sends no faster than all cards of its machine together.
        """
        speed = gpu.nvlink if self.group <= per_node else min(gpu.nvlink, per_node * gpu.network)
        hops = self.group - 1 if self.kind == "all_gather" else 2 * math.log2(self.group)
        return self.sent / (LINK_EFFICIENCY * speed) + self.count * hops * HOP_SECONDS


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model: of one layer and of the rest (the embedding) in bfloat16, of the adapters' gradients in
    float32.

    Attributes:
        layers: their number.
        hidden: the hidden size.
    """

    layers: int
    layer: float
    rest: float
    adapter: float
    hidden: int


def collectives(
    kind: str, sizes: ModelBytes, gpus: int, per_node: int, tokens: int, checkpointing: bool
) -> list[Collective]:
    """The communication of strategy `kind` in a step of one micro-batch of `tokens`; see training/distribute.py.

    With any strategy, only the adapters' gradients are reduced at the end of a step: the base is frozen.
    """
    found = [Collective("all_reduce", 1, sizes.adapter + 4, gpus)]  # with the loss
    if kind == "fsdp2":  # each layer forward and backward; recomputation happens while it is gathered
        found += [
            Collective("all_gather", 2 * sizes.layers, sizes.layer, gpus),
            Collective("all_gather", 1, sizes.rest, gpus),
        ]
    if kind == "tp":
        # Outputs of attention and MLP, again when recomputed, and gradients of their inputs; without checkpointing the
        # first layer's inputs need none.
        times = 6 * sizes.layers if checkpointing else 4 * sizes.layers - 1
        found.append(Collective("all_reduce", times, 2.0 * tokens * sizes.hidden, min(gpus, per_node)))
    return found


@dataclass
class Plan:
    """One strategy on one number of GPUs: memory of each GPU in GiB, and bytes sent by each and seconds of a step."""

    gpus: int
    strategy: str
    memory: dict[str, float]
    fits: bool
    micro_batches: int
    sent: float
    seconds: float
    # What the arithmetic alone would take at COMPUTE_EFFICIENCY of the peak, over what it takes with messages.
    efficiency: float
    mfu: float
    tokens_per_second: float


def plan(options: Options, overrides: list[str], gpus: int, strategy: str, kind: str, peft: str) -> Plan:
    """
    Raises:
        UserError: the strategy does not take this model or number of GPUs.
    """
    import torch

    from training.flops import BF16_PEAKS, flops_of
    from training.launcher import check_tensor_parallel
    from training.memory import GIB, estimate

    gpu, devices = GPUS[options.gpu], min(gpus, options.per_node)
    config = load_config(
        [
            *overrides,
            f"peft={peft}",
            "trainer=gpu",
            f"trainer.devices={devices}",
            f"trainer.num_nodes={gpus // devices}",
            f"trainer.strategy={kind}",
        ]
    )
    architecture, checkpointing = architecture_of(config), config.task.train.gradient_checkpointing
    replicas = gpus // devices if kind == "tp" else gpus
    samples = options.step_tokens // options.length / replicas  # of a step, for each replica
    micro_batches = math.ceil(samples * options.length / config.trainer.micro_batch_tokens)
    micro_batch_samples = max(1, round(samples / micro_batches))
    tokens = micro_batch_samples * options.length
    with tempfile.TemporaryDirectory() as folder:
        architecture.save_pretrained(folder)
        check_tensor_parallel(config, Path(folder))
        need = estimate(config, Path(folder), torch.bfloat16, tokens, tokens // 2)

    adapters = config.peft.r, config.peft.target_modules, config.peft.target_parameters or ()
    flops = flops_of(architecture, [options.length] * micro_batch_samples, tokens // 2, *adapters)
    forward = flops.layers / 2 + flops.adapters / 3 + flops.attention / 3
    backward = flops.total - flops.output - forward + (forward if checkpointing else 0)
    split = devices if kind == "tp" else 1  # the output layer is not split
    rate = COMPUTE_EFFICIENCY * BF16_PEAKS[options.gpu]
    forward_seconds, backward_seconds = ((part / split + flops.output / 2) / rate for part in (forward, backward))

    sizes = model_bytes(architecture, need.adapter / 3)
    at_end, *in_micro_batch = collectives(kind, sizes, gpus, options.per_node, tokens, checkpointing)
    times = [collective.seconds(gpu, options.per_node) for collective in in_micro_batch]
    if (
        kind == "fsdp2"
    ):  # a layer is gathered while the one before is computed; the first layer and the rest are waited for
        one_way = times[0] / 2
        micro_batch = max(forward_seconds, one_way) + max(backward_seconds, one_way) + one_way / sizes.layers + times[1]
    else:
        micro_batch = forward_seconds + backward_seconds + sum(times)
    seconds = micro_batches * micro_batch + at_end.seconds(gpu, options.per_node)
    done = replicas * micro_batches / gpus / seconds  # micro-batches a second, of each GPU's share in them
    return Plan(
        gpus,
        strategy,
        memory={part: size / GIB for part, size in asdict(need).items() if part != "process"},
        fits=need.total < USABLE_MEMORY * gpu.memory * GIB,
        micro_batches=micro_batches,
        sent=micro_batches * sum(collective.sent for collective in in_micro_batch) + at_end.sent,
        seconds=seconds,
        efficiency=done * (forward + backward + flops.output) / rate,
        mfu=done * flops.total / BF16_PEAKS[options.gpu],
        tokens_per_second=replicas * micro_batches * tokens / seconds,
    )


def architecture_of(config: Any) -> Any:
    """The architecture of the model that `config` names: of its folder if that exists, else as published.

    Raises:
        UserError: a model that is neither.
    """
    from transformers import AutoConfig

    folder = Path(config.model.path or Path(config.model.models_dir) / config.model.name)
    if (folder / "config.json").exists():
        return AutoConfig.from_pretrained(folder).get_text_config()
    name = config.model.name.removesuffix("-it")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{folder} is not there, so the architecture of {name} is not known. Fetch it (make base "
            f"MODEL={name}), or take one of {known}"
        )
    family, options = ARCHITECTURES[name]
    return AutoConfig.for_model(family, **options)


def model_bytes(architecture: Any, adapter: float) -> ModelBytes:
    """The sizes of `architecture`; `adapter` is in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    total, in_layers = (sum(weight.nbytes for weight in part.parameters()) for part in (base, base.model.layers))
    layers = architecture.num_hidden_layers
    return ModelBytes(layers, in_layers / layers, total - in_layers, adapter, architecture.hidden_size)
