"""What a model would need on a cluster that nobody here has: memory, messages and time of a step, by a stated model.

    python -m benchmarks.scaling                                        (Gemma 2 27B on 8, 64 and 512 H100)
    python -m benchmarks.scaling model=gemma-3-12b gpus=8,16 gpu=A100 step_tokens=262144 peft.r=32

Words of its own, beside those of the configuration:
    gpus          how many, comma-separated; the default is 8,64,512
    gpu           their kind, a name of GPUS below; H100
    per_node      GPUS of a machine; 8
    step_tokens   tokens of an optimizer step, of all GPUs together; 1048576
    length        tokens of a row, half of them learned; 512

Prints the table, and writes it with its plot to docs/scaling.md where no word is given. A plan and no measurement: what
of it is held to real runs, and what is assumed, stands in that document.
"""

import math
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.random_base import ARCHITECTURES
from core.configuration import load_config
from core.errors import UserError, run


@dataclass(frozen=True)
class Gpu:
    """From NVIDIA's data sheets: memory in GiB, and bytes a second that one GPU sends over NVLink and over its network
    card (DGX: one card a GPU). Arithmetic is in training/flops.py."""

    memory: float
    nvlink: float
    network: float


GPUS = {
    "H100": Gpu(80, 450e9, 50e9),  # DGX H100: NVLink 4, 900 GB/s both ways; ConnectX-7, 400 Gb/s
    "H200": Gpu(141e9 / 2**30, 450e9, 50e9),
    "A100": Gpu(80, 300e9, 25e9),  # DGX A100: NVLink 3, 600 GB/s both ways; ConnectX-6, 200 Gb/s
}
# Assumed, as nobody has measured this project there.
REACHED = 0.5  # of the peak, by arithmetic; Narayanan et al. (2021) reach 0.44 to 0.52 of an A100's with all included
LINK = 0.8  # of a link's nominal speed, by NCCL with large messages
HOP = 5e-6  # seconds of a message from one GPU to the next, however small
ROOM = 0.9  # of a GPU's memory; the rest is CUDA's, NCCL's and gaps

# The name of a line: trainer.strategy, PEFT
STRATEGIES = {"ddp": ("ddp", "lora"), "ddp, qlora": ("ddp", "qlora"), "fsdp2": ("fsdp2", "lora"), "tp": ("tp", "lora")}


@dataclass
class Words:
    """The words of this command; `read` parses them."""

    gpus: list[int]
    gpu: str = "H100"
    per_node: int = 8
    step_tokens: int = 2**20
    length: int = 512

    @classmethod
    def read(cls, words: list[str]) -> tuple["Words", list[str]]:
        """
        Returns:
            The words, and those left for the configuration.

        Raises:
            UserError: a number that is none, an unknown GPU, or numbers that do not go into each other.
        """
        given, others = cls([8, 64, 512]), []
        for word in words:
            name, _, value = word.partition("=")
            if name == "gpu":
                given.gpu = value
            elif name in ("gpus", "per_node", "step_tokens", "length"):
                numbers = value.split(",") if name == "gpus" else [value]
                if not all(number.isdecimal() and int(number) > 0 for number in numbers):
                    raise UserError(f"{word}: {name} is a whole number above 0")
                setattr(given, name, [int(number) for number in numbers] if name == "gpus" else int(value))
            else:
                others.append(word)
        if given.gpu not in GPUS:
            raise UserError(f"gpu={given.gpu} is unknown. Known: {', '.join(GPUS)}")
        for gpus in given.gpus:
            if gpus > given.per_node and gpus % given.per_node:
                raise UserError(f"gpus={gpus} is no multiple of per_node={given.per_node}")
            if given.step_tokens // gpus < given.length:
                raise UserError(
                    f"step_tokens={given.step_tokens:,} gives {gpus} GPUs less than a row of {given.length} each"
                )
        return given, others


@dataclass(frozen=True)
class Message:
    """One kind of collective in a step: `count` of `size` bytes, among `group` GPUs."""

    kind: str  # all_gather: `size` is what each then holds; all_reduce: what each gives and gets
    count: int
    size: float
    group: int

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends, in a ring (Patarasuk and Yuan, 2009)."""
        passes = {"all_gather": 1, "all_reduce": 2}[self.kind]
        return self.count * passes * self.size * (self.group - 1) / self.group

    def seconds(self, gpu: Gpu, per_node: int) -> float:
        """Bytes over bandwidth, and the way of the first byte: around the ring, or up and down NCCL's tree.

        A ring enters and leaves each machine once; there are as many rings as network cards, so that between machines
        each GPU sends no faster than all cards of its machine do.
        """
        speed = gpu.nvlink if self.group <= per_node else min(gpu.nvlink, per_node * gpu.network)
        hops = self.group - 1 if self.kind == "all_gather" else 2 * math.log2(self.group)
        return self.sent / (LINK * speed) + self.count * hops * HOP


@dataclass(frozen=True)
class Sizes:
    """Bytes: of one layer and of all else (the embedding) in bfloat16, of the adapters' gradients in float32; width."""

    layers: int
    layer: float
    rest: float
    adapter: float
    hidden: int


def messages(kind: str, sizes: Sizes, gpus: int, per_node: int, tokens: int, checkpointing: bool) -> list[Message]:
    """What strategy `kind` sends in a step of one micro-batch of `tokens`; see training/distribute.py.

    Only the adapters' gradients travel at the end of a step, whatever the strategy: the base is frozen.
    """
    found = [Message("all_reduce", 1, sizes.adapter + 4, gpus)]  # with the loss
    if kind == "fsdp2":  # each layer forward and backward; what is checkpointed is computed again while it is there
        found += [
            Message("all_gather", 2 * sizes.layers, sizes.layer, gpus),
            Message("all_gather", 1, sizes.rest, gpus),
        ]
    if kind == "tp":
        # Outputs of attention and MLP, again where checkpointed; and gradients of their inputs, those of the first
        times = 6 * sizes.layers if checkpointing else 4 * sizes.layers - 1  # need none otherwise
        found.append(Message("all_reduce", times, 2.0 * tokens * sizes.hidden, min(gpus, per_node)))
    return found


@dataclass
class Plan:
    """Of one strategy on one number of GPUs: GiB of each GPU, and bytes and seconds of a step."""

    gpus: int
    strategy: str
    memory: dict[str, float]
    fits: bool
    micro_batches: int
    sent: float
    seconds: float
    efficiency: float  # what the arithmetic alone would take at REACHED of the peak, over what it takes with messages
    mfu: float
    tokens_per_second: float


def plan(own: Words, others: list[str], gpus: int, strategy: str, kind: str, peft: str) -> Plan:
    """
    Raises:
        UserError: the strategy does not take this model or number of GPUs.
    """
    import torch

    from training.flops import BF16_PEAKS, flops_of
    from training.launch import check_heads
    from training.memory import GIB, estimate

    gpu, devices = GPUS[own.gpu], min(gpus, own.per_node)
    config = load_config(
        [
            *others,
            f"peft={peft}",
            "trainer=gpu",
            f"trainer.devices={devices}",
            f"trainer.num_nodes={gpus // devices}",
            f"trainer.strategy={kind}",
        ]
    )
    architecture, checkpointing = architecture_of(config), config.task.train.gradient_checkpointing
    replicas = gpus // devices if kind == "tp" else gpus
    rows = own.step_tokens // own.length / replicas  # of a step, for each replica
    micro_batches = math.ceil(rows * own.length / config.trainer.micro_batch_tokens)
    rows_at_once = max(1, round(rows / micro_batches))
    tokens = rows_at_once * own.length
    with tempfile.TemporaryDirectory() as folder:
        architecture.save_pretrained(folder)
        check_heads(config, Path(folder))
        need = estimate(config, Path(folder), torch.bfloat16, tokens, tokens // 2)

    targets = list(config.peft.target_modules)
    flops = flops_of(architecture, [own.length] * rows_at_once, tokens // 2, config.peft.r, targets)
    forward = flops.layers / 2 + flops.adapters / 3 + flops.attention / 3
    backward = flops.total - flops.output - forward + (forward if checkpointing else 0)
    split = devices if kind == "tp" else 1  # the output layer is not split
    rate = REACHED * BF16_PEAKS[own.gpu]
    down, up = ((part / split + flops.output / 2) / rate for part in (forward, backward))

    sizes = sizes_of(architecture, need.adapter / 3)
    at_end, *each = messages(kind, sizes, gpus, own.per_node, tokens, checkpointing)
    times = [message.seconds(gpu, own.per_node) for message in each]
    if kind == "fsdp2":  # a layer is gathered while the one before is computed; the first, and the rest, are waited for
        one_way = times[0] / 2
        micro_batch = max(down, one_way) + max(up, one_way) + one_way / sizes.layers + times[1]
    else:
        micro_batch = down + up + sum(times)
    seconds = micro_batches * micro_batch + at_end.seconds(gpu, own.per_node)
    done = replicas * micro_batches / gpus / seconds  # micro-batches a second, of each GPU's share in them
    return Plan(
        gpus,
        strategy,
        memory={part: size / GIB for part, size in asdict(need).items() if part != "process"},
        fits=need.total < ROOM * gpu.memory * GIB,
        micro_batches=micro_batches,
        sent=micro_batches * sum(message.sent for message in each) + at_end.sent,
        seconds=seconds,
        efficiency=done * (forward + backward + flops.output) / rate,
        mfu=done * flops.total / BF16_PEAKS[own.gpu],
        tokens_per_second=replicas * micro_batches * tokens / seconds,
    )


def architecture_of(config: Any) -> Any:
    """Of the model that `config` names: of its folder where that is on disk, else as published.

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
            f"{folder} is not there, so the shape of {name} is not known. Fetch it (make base "
            f"MODEL={name}), or take one of {known}"
        )
    family, options = ARCHITECTURES[name]
    return AutoConfig.for_model(family, **options)


def sizes_of(architecture: Any, adapter: float) -> Sizes:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    total, in_layers = (sum(weight.nbytes for weight in part.parameters()) for part in (base, base.model.layers))
    layers = architecture.num_hidden_layers
    return Sizes(layers, in_layers / layers, total - in_layers, adapter, architecture.hidden_size)


def main(words: list[str]) -> None:
    from benchmarks import scaling_docs

    own, others = Words.read(words)
    if not any(word.startswith("model=") for word in others):
        others = ["model=gemma-2-27b", *others]
    if not any("gradient_checkpointing=" in word for word in others):
        others = ["task.train.gradient_checkpointing=true", *others]
    config = load_config(others)
    sizes = sizes_of(architecture_of(config), 0)
    plans, refused = [], []
    for gpus in own.gpus:
        for strategy, (kind, peft) in STRATEGIES.items():
            print(f"{gpus} GPUs, {strategy}", file=sys.stderr, flush=True)
            try:
                plans.append(plan(own, others, gpus, strategy, kind, peft))
            except UserError as error:
                refused.append(f"{gpus} GPUs, {strategy}: {error}")
    said = facts(own, config, sizes, plans) + refused
    scaling_docs.show(plans, said)
    if not words:
        print(f"written: {scaling_docs.write(plans, said)}")


def facts(own: Words, config: Any, sizes: Sizes, plans: list[Plan]) -> list[str]:
    """Sentences on the case, and which strategy it asks for."""
    whole = sizes.layers * sizes.layer + sizes.rest
    found = [
        f"{config.model.name}: {whole / 2 / 1e9:.1f} billion weights, {whole / 1e9:.1f} GB in bfloat16; LoRA of rank "
        f"{config.peft.r}; {own.gpu} with {GPUS[own.gpu].memory:.0f} GiB, {own.per_node} in a machine; "
        f"{own.step_tokens:,} tokens a step, in rows of {own.length}, half of their tokens learned; gradient "
        f"checkpointing {'on' if config.task.train.gradient_checkpointing else 'off'}."
    ]
    if plans:
        adapter = plans[0].memory["adapter"] / 3 * 2**30
        found.append(
            f"At the end of a step {adapter / 1e9:.2f} GB of adapter gradients (float32) are summed. Training all "
            f"weights would sum {whole / 1e9:.0f} GB (bfloat16), {whole / adapter:,.0f} times as much."
        )
    for gpus in dict.fromkeys(one.gpus for one in plans):
        fitting = [one for one in plans if one.gpus == gpus and one.fits and "qlora" not in one.strategy]
        if fitting:
            best = max(fitting, key=lambda one: one.tokens_per_second)
            found.append(
                f"On {gpus} GPUs {best.strategy} is the fastest in this model that fits, with "
                f"{best.seconds:.2f} s a step."
            )
        else:
            found.append(f"On {gpus} GPUs nothing fits with a bfloat16 base.")
    return found


if __name__ == "__main__":
    run(main)
