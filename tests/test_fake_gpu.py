"""The training step on fake CUDA tensors, and faults put into it on purpose, each of which must be found."""

import json
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT

# Fake CUDA has to be there before torch is imported, so the rounds are in a process of their own.
ROUNDS = """
import json, sys
from benchmarks.fake_gpu import fault, load_fake_cuda
load_fake_cuda()
import torch
from training import batches, experts, gemma_lora

true_loss, true_experts = gemma_lora.loss_sum, gemma_lora.round_experts

def in_backward(gemma, batch):
    loss = true_loss(gemma, batch)
    loss.register_hook(lambda gradient: gradient * float(gradient))
    return loss

LOSSES = {
    "item": lambda gemma, batch: true_loss(gemma, batch) + (len(batch.targets) - batch.targets[0].item() * 0),
    "backward": in_backward,
    "cpu": lambda gemma, batch: true_loss(gemma, batch) + batch.targets.cpu().sum().to("cuda"),
    "main memory": lambda gemma, batch: true_loss(gemma, batch) + batch.targets[torch.tensor([0])].sum(),
    "device": lambda gemma, batch: true_loss(gemma, batch) + torch.ones(1).sum(0, keepdim=True),
    "shape": lambda gemma, batch: true_loss(gemma, batch) + torch.ones(3, device="cuda") @ torch.ones(4, device="cuda"),
    "number of rows": lambda gemma, batch: true_loss(gemma, batch) + batch.targets.nonzero().sum(),
}
found = {}
for name, words, changes, broken in json.loads(sys.argv[1]):
    gemma_lora.loss_sum = LOSSES.get(broken, true_loss)
    if broken == "experts":
        gemma_lora.round_experts = lambda gemma, device: true_experts(gemma, torch.device("cpu"))
    found[f"{name} {broken}"] = fault(name, words, **changes)
    gemma_lora.round_experts = true_experts
print("\\n" + json.dumps(found))
"""
SMALL = {"vocab_size": 4096}  # the loss takes most of the time
TWO = SMALL | {"num_hidden_layers": 2}


CHECKPOINTING = ["task.train.gradient_checkpointing=true"]
SOUND: list[tuple[str, list[str], dict[str, Any]]] = [
    ("gemma-2b", [], TWO),
    ("gemma-2-2b", CHECKPOINTING, TWO),
    ("gemma-3-1b", ["peft.use_dora=true", "peft.lora_dropout=0.1"], TWO),
    *((f"gemma-4-{size}-cut", CHECKPOINTING, SMALL) for size in ("e2b", "12b", "26b-a4b")),
]
BROKEN = {  # what is put into the step, and what is said of it
    "item": "_local_scalar_dense",
    "backward": "_local_scalar_dense",
    "cpu": "copies from the GPU",
    "main memory": "in main memory",
    "device": "same device",
    "shape": "size",
    "number of rows": "nonzero",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    """What is found in each round, by the architecture and what is broken in it."""
    rounds = [(*one, "") for one in SOUND] + [("gemma-2b", [], TWO, kind) for kind in BROKEN]
    rounds.append(("gemma-4-26b-a4b-cut", [], SMALL, "experts"))
    command = [sys.executable, "-c", ROUNDS, json.dumps(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [name for name, *_ in SOUND])
def test_a_step_neither_waits_for_the_gpu_nor_leaves_it(name: str, found: dict[str, str | None]) -> None:
    assert found[f"{name} "] is None


@pytest.mark.parametrize("kind", BROKEN)
def test_a_fault_is_found(kind: str, found: dict[str, str | None]) -> None:
    assert BROKEN[kind] in (found[f"gemma-2b {kind}"] or "")


def test_a_fault_is_told_with_its_place(found: dict[str, str | None]) -> None:
    """A processor's way to compute experts asks how many tokens each of them has."""
    assert (found["gemma-4-26b-a4b-cut experts"] or "").startswith("training/experts.py:")
