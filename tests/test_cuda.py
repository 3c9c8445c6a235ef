"""What only a GPU can show: compiled attention, and each kernel that takes another way there than on a CPU.

    .venv/bin/python -m pytest tests/test_cuda.py

Skipped where there is no NVIDIA GPU.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import PagedAdamW32bit
from conftest import FAMILIES, ROOT
from test_packing import ROWS, gradients, hidden_of_rows, with_lora

from core.run_folder import read_metrics
from training.cross_entropy import linear_cross_entropy
from training.fused_layers import fuse_layers
from training.packed_attention import _flex_attention, use_packed_attention
from training.packing import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# Of a norm. Plain transformers and peft in bfloat16 are 0.06 away from float32 in these random layers.
CLOSE = {torch.float32: 2e-3, torch.bfloat16: 0.1}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 as float32: TF32 rounds to 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_packs_have_the_hidden_states_and_gradients_of_single_samples(family: str, dtype: torch.dtype) -> None:
    """Single rows in float32 by plain transformers and peft; windows are exceeded."""
    model = with_lora(family).cuda()
    gemma = model.get_base_model()
    weight = torch.linspace(-1, 1, gemma.config.hidden_size, device="cuda")
    alone = [gemma.model(torch.tensor([row]).cuda(), use_cache=False).last_hidden_state[0] for row in ROWS]
    sum((hidden * weight).square().sum() for hidden in alone).backward()
    expected = gradients(model)

    model.zero_grad()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    fuse_layers(model)
    use_packed_attention(gemma)
    packed = hidden_of_rows(gemma, ROWS)
    sum((hidden.float() * weight).square().sum() for hidden in packed).backward()
    for one, other in zip(packed, alone, strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() < CLOSE[dtype] * other.norm()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < CLOSE[dtype] * gradient.norm(), name


def test_attention_and_its_mask_are_compiled_once_for_packs_of_any_length() -> None:
    from torch._dynamo.utils import counters

    graphs = []
    for longest in (150, 300, 420, 200, 350):
        layout = pack([[2, *range(10, 10 + longest)], [2, *range(400, 420)]]).layout.to(torch.device("cuda"))
        tokens = layout.positions.shape[1]
        query, key = torch.randn(1, 4, tokens, 16).cuda(), torch.randn(1, 2, tokens, 16).cuda()
        for window in (None, 16):
            _flex_attention(query, key, key, layout, 0.25, window, 50.0)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1]


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_chunked_loss_equals_the_plain_one(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(77, 64, device="cuda", requires_grad=True)
    weight, targets = torch.randn(5000, 64, device="cuda"), torch.randint(5000, (77,), device="cuda")
    logits = hidden @ weight.T
    plain = torch.nn.functional.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets)
    (expected,) = torch.autograd.grad(plain, hidden)
    chunked = linear_cross_entropy(hidden, weight, targets, softcap).mean()
    (found,) = torch.autograd.grad(chunked, hidden)
    torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_paged_adamw_takes_the_steps_of_adamw() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(512, 256, device="cuda"), torch.randn(512, 256, device="cuda")
    ends = []
    for kind in (torch.optim.AdamW, PagedAdamW32bit):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=1e-2, weight_decay=0.01)
        for _ in range(5):
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["peft=qlora"], ["task.train.gradient_checkpointing=true"]])
def test_a_run_on_a_gpu_lowers_the_loss_and_reports(words: list[str], tiny_base: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "commands.train",
            f"model.path={tiny_base}",
            "trainer=gpu",
            f"data_dir={tmp_path}/data",
            f"runs_dir={tmp_path}/runs",
            "task.train.epochs=2",
            "task.train.learning_rate=1e-2",
            "task.train.log_every=1",
            "task.generate.max_new_tokens=4",
            *words,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"},
    )
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs" / "slang").iterdir()
    assert (run / "report.html").stat().st_size > 0
    steps = read_metrics(run)[0]
    assert steps[-1].train_loss < steps[0].train_loss and all(line.memory_gib > 0 for line in steps)
