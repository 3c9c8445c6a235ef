#!/bin/sh
# Fake tensors tell of a host that asks a GPU for a number, and not of one that copies the whole tensor.
#
# A good engineer's guess, written down before the run: whoever runs a training step under FakeTensorMode, to find what
# waits for the GPU, finds all of it. `x.sum().item()` raises, so `x.cpu()` and copying x into a tensor in main memory do.
# Seen (torch 2.13.0): .item(), .tolist() and bool() raise DataDependentOutputException. .cpu(), .to("cpu") and
# `torch.zeros(4).copy_(x)` pass without a word: what comes back is a fake tensor on the CPU. On a GPU each of them waits
# until everything queued before it is done, as .item() does.
# Why it matters: a step that is "clean" under fake tensors may still wait in every layer, for instance for an index that
# is computed in main memory.
# This project: benchmarks/fake_gpu.py refuses such copies by a dispatch mode of its own beside the fake tensors.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/python -W ignore - <<'PYTHON'
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

with FakeTensorMode():
    x = torch.ones(4, device="cuda")
    waits = {
        ".item()": lambda: x.sum().item(),
        ".tolist()": lambda: x.tolist(),
        "bool()": lambda: bool(x.sum() > 0),
        ".cpu()": lambda: x.cpu(),
        '.to("cpu")': lambda: x.to("cpu"),
        "zeros(4).copy_()": lambda: torch.zeros(4).copy_(x),
    }
    said = {}
    for name, wait in waits.items():
        try:
            said[name] = f"passes, a tensor on {wait().device}"
        except DataDependentOutputException as error:
            said[name] = type(error).__name__
print(f"torch {torch.__version__}")
for name, what in said.items():
    print(f"{name:18}{what}")
assert [what.partition(",")[0] for what in said.values()] == ["DataDependentOutputException"] * 3 + ["passes"] * 3
PYTHON
