"""What docs/scaling.md plans is what real processes hold, send and compute, as far as two of a CPU can show."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from conftest import ROOT, tiny_gemma
from peft import LoraConfig, PeftModel, get_peft_model
from test_distribute import LOOPBACK, TARGETS, adapters, rows, tiny_lora
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_base import ARCHITECTURES
from benchmarks.scaling import main
from benchmarks.scaling_model import (
    GPUS,
    Collective,
    ModelBytes,
    Options,
    architecture_of,
    collectives,
    model_bytes,
    plan,
)
from core.configuration import load_config
from core.errors import UserError
from training.batches import Batches
from training.distribute import AdapterParallel, shard_base, split_base
from training.flops import flops_of
from training.memory import estimate

CASE = Options()
CHECKPOINTED = ["model=gemma-2-27b", "task.train.gradient_checkpointing=true"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # outside of the embedding: tables of the Gemma 1 and Gemma 2 technical reports
        ("gemma-2b", 1_981_884_416),
        ("gemma-7b", 7_751_248_896),
        ("gemma-2-2b", 2_024_517_888),
        ("gemma-2-9b", 8_324_201_984),
        ("gemma-2-27b", 26_047_480_320),
    ],
)
def test_architectures_have_the_parameter_counts_of_their_reports(name: str, parameters: int) -> None:
    family, options = ARCHITECTURES[name]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    assert sum(p.numel() for p in base.parameters()) - base.model.embed_tokens.weight.numel() == parameters


@pytest.mark.parametrize(
    ("name", "billions", "used"),
    [  # Gemma 4's model card, ai.google.dev/gemma/docs/core/model_card_4: all of the text model, and what a token uses
        ("gemma-4-e2b", None, 2.3),
        ("gemma-4-26b-a4b", 25.2, 3.8),
        ("gemma-4-31b", 30.7, 30.7),
    ],
)
def test_architectures_of_gemma_4_have_the_sizes_of_its_model_card(
    name: str, billions: float | None, used: float
) -> None:
    family, options = ARCHITECTURES[name]
    config = AutoConfig.for_model(family, **options)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    sizes = {name: parameter.numel() for name, parameter in base.named_parameters()}
    if billions:
        assert round(sum(sizes.values()) / 1e9, 1) == billions
    tables = sum(size for name, size in sizes.items() if "embed_tokens_per_layer" in name)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    share = config.top_k_experts / config.num_experts if experts else 0
    assert round((sum(sizes.values()) - tables - experts * (1 - share)) / 1e9, 1) == used


# --- what is sent and held ------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Writes down each collective that torch is asked for: its kind and its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.allreduce_"):
            self.seen.append(("all_reduce", sum(tensor.nbytes for tensor in args[0])))
        elif name.startswith("c10d._allgather_base_"):
            self.seen.append(("all_gather", args[0].nbytes))
        elif name.startswith("c10d."):
            raise AssertionError(f"{name} is in no plan")
        return func(*args, **(kwargs or {}))


def watch_a_step(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    micro_batch = next(iter(Batches(rows(), 8, 4096, 0))).micro_batches[0]
    for kind, checkpointing in (("ddp", False), ("fsdp2", False), ("fsdp2", True), ("tp", False), ("tp", True)):
        model = tiny_lora("gemma2")
        gemma = model.get_base_model()
        in_layers, whole = (
            sum(p.nbytes for p in part.parameters() if not p.requires_grad) for part in (gemma.model.layers, gemma)
        )
        layers, hidden = gemma.config.num_hidden_layers, gemma.config.hidden_size
        adapter = sum(p.nbytes for p in adapters(model))
        if checkpointing:
            gemma.train()
            gemma.gradient_checkpointing_enable({"use_reentrant": False})
        strategy = AdapterParallel(kind)
        strategy.parallel_devices = [torch.device("cpu")] * 2
        if kind == "fsdp2":
            shard_base(gemma, mesh)
        elif kind == "tp":
            split_base(gemma, mesh.get_group())
        with Traffic() as traffic:
            loss = gemma.loss_sum(micro_batch)
            loss.backward()
            strategy.sum_step(adapters(model), loss.detach())
        # In float32 here, where the plan counts bfloat16.
        sizes = ModelBytes(layers, in_layers / layers, whole - in_layers, adapter, 2 * hidden)
        planned = collectives(kind, sizes, 2, 2, micro_batch.input_ids.numel(), checkpointing)
        for wanted in ("all_reduce", "all_gather"):
            sent = [size for name, size in traffic.seen if name == wanted]
            assert len(sent) == sum(message.count for message in planned if message.kind == wanted), (
                kind,
                wanted,
                sent,
            )
            expected = sum(message.count * message.size for message in planned if message.kind == wanted)
            assert sum(sent) == pytest.approx(expected, rel=1e-3), (kind, wanted)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_step_communicates_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("OMP_NUM_THREADS", "1"), LOOPBACK):
        monkeypatch.setenv(name, value)
    assert torch.multiprocessing.spawn(watch_a_step, (str(tmp_path),), nprocs=2) is None  # else it raises


def test_the_plan_has_the_share_of_the_base_that_a_process_holds(tmp_path: Path) -> None:
    """As test_distribute.py finds it in real processes: all; half, and a layer or two; half, but the embedding."""
    base = tiny_gemma("gemma2", torch.bfloat16, vocab_size=600, num_hidden_layers=3)
    base.save_pretrained(tmp_path)
    layers, whole = (sum(p.nbytes for p in part.parameters()) for part in (base.model.layers, base))
    norms = sum(p.nbytes for name, p in base.model.layers.named_parameters() if "norm" in name)

    def need(*words: str) -> Any:
        config = load_config(["trainer=cpu", *words])
        return estimate(config, tmp_path, torch.bfloat16, tokens=1000, targets=500)

    alone, ddp, fsdp2, tp = (
        need(),
        *(need("trainer.devices=2", f"trainer.strategy={kind}") for kind in ("ddp", "fsdp2", "tp")),
    )
    assert alone.weights == ddp.weights == whole
    assert fsdp2.weights == pytest.approx(whole / 2 + (whole - layers) + 2 * layers / 3)
    assert tp.weights == pytest.approx(whole - (layers - norms) / 2)
    assert ddp.adapter == 1.5 * alone.adapter and tp.activations < alone.activations == fsdp2.activations


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_with_checkpointing_equal_those_that_torch_counts(checkpointing: bool) -> None:
    length, rank = 48, 4
    model: PeftModel = get_peft_model(
        tiny_gemma("gemma2", attn_implementation="eager", sliding_window=64), LoraConfig(r=rank, target_modules=TARGETS)
    )
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    config = model.config
    flops = flops_of(config, [length], length, rank, TARGETS)
    pairs = 2 * length / (length + 1)  # eager attention computes both halves of the mask
    attention = flops.attention * pairs
    forward = flops.layers / 2 + flops.adapters / 3 + attention / 3
    expected = flops.layers + flops.adapters + flops.output + attention + checkpointing * forward
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)  # the first layer's inputs need no gradient


# --- the model's own sense ------------------------------------------------------------------------------------------


def test_the_time_of_a_collective_follows_from_bytes_and_hops() -> None:
    gpu = GPUS["H100"]
    eight = Collective("all_reduce", 1, 8e9, 8)
    assert eight.sent == 2 * 8e9 * 7 / 8
    assert eight.seconds(gpu, 8) == pytest.approx(14e9 / (0.8 * 450e9), rel=1e-2)
    across = Collective("all_reduce", 1, 8e9, 64)
    assert across.seconds(gpu, 8) == pytest.approx(across.sent / (0.8 * 8 * 50e9), rel=1e-2)
    small = Collective("all_gather", 10, 512, 512)
    assert small.seconds(gpu, 8) == pytest.approx(10 * 511 * 5e-6, rel=1e-2)


@pytest.mark.slow
def test_the_plan_shows_the_effect_of_lora_and_the_limit_of_sharding() -> None:
    plans = {
        (gpus, kind): plan(CASE, CHECKPOINTED, gpus, kind, kind, "lora")
        for gpus, kind in ((8, "ddp"), (512, "ddp"), (8, "fsdp2"), (512, "fsdp2"))
    }
    sizes = model_bytes(architecture_of(load_config(["model=gemma-2-27b"])), 0)
    whole = sizes.layers * sizes.layer + sizes.rest
    assert plans[512, "ddp"].sent < 2 * whole / 100, "adapters' gradients are a small part of all gradients"
    assert plans[8, "fsdp2"].efficiency > 0.95 > plans[512, "fsdp2"].efficiency
    assert (
        plans[512, "fsdp2"].memory["weights"] < plans[8, "fsdp2"].memory["weights"] < plans[8, "ddp"].memory["weights"]
    )
    assert plans[512, "ddp"].seconds < plans[8, "ddp"].seconds / 60
    for one in plans.values():
        assert one.mfu < one.efficiency <= 1
    tokens = load_config(["trainer=gpu"]).trainer.micro_batch_tokens
    assert plans[8, "ddp"].micro_batches * tokens * 8 == CASE.step_tokens


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gpus=8,x"], "gpus must be a whole number, not 'x'"),
        (["gpus=12"], "gpus=12 is no multiple of per_node=8"),
        (["gpu=B9000"], "Known: H100"),
        (["gpus=512", "step_tokens=1024"], "less than a sample of 512"),
    ],
)
def test_an_invalid_argument_gives_one_sentence(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        main(words)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    config = SimpleNamespace(model=SimpleNamespace(path=None, models_dir=str(tmp_path), name="gemma-9-9t"))
    with pytest.raises(UserError, match="one of gemma-2b"):
        architecture_of(config)


@pytest.mark.slow
def test_the_command_prints_any_model_on_any_cluster_without_writing_files() -> None:
    before = (ROOT / "docs/scaling.md").read_bytes()
    words = ["model=gemma-3-1b", "gpus=4,16", "gpu=A100", "step_tokens=65536", "peft.r=32"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines if line[:1] in (["4"], ["16"]) and line[1] != "GPUs,"] == [
        [gpus, strategy.split()[0]] for gpus in ("4", "16") for strategy in ("ddp", "ddp,", "fsdp2")
    ]
    assert "trainer.strategy=tp: gemma-3-1b has 1 key/value heads, so it cannot be split" in result.stdout
    assert (ROOT / "docs/scaling.md").read_bytes() == before
