"""On one machine a training gives the same bits whatever else runs there; on another form it differs by little.

Each training is a process of its own: this project's loop as benchmarks/systems.py runs it, on a small random Gemma
whose products and kernels several threads divide among themselves.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_gemma
from launcher import ENVIRONMENT
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.systems import Job
from benchmarks.train import Evaluator, run_rounds
from core.c_build import processor_flags
from core.machine import AVX2

pytestmark = pytest.mark.slow
STEPS, ROWS_OF_A_STEP = 4, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "target_modules": TARGETS}
# The largest difference of a held-out loss after these steps, as a share of what they gained. float32: sums in another
# order are rounded otherwise. bfloat16: weights and activations have 8 bits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
Trained = tuple[dict[str, Tensor], float]
Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Train:
    """Trains in `dtype` with variables of the environment; returns the adapter, and its held-out loss as a share of the
    loss before."""
    folder = tmp_path_factory.mktemp("determinism")
    base = folder / "base"
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    tiny_gemma("gemma3_text", **sizes).save_pretrained(base)
    for file in tiny_base.glob("tokenizer*"):
        (base / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(30, 90, (STEPS * ROWS_OF_A_STEP,), generator=generator).tolist():
        ids = torch.randint(3, 600, (length - 1,), generator=generator) // torch.arange(1, length) + 3
        rows.append({"input_ids": [2, *ids.tolist()], "target_ranges": [[length // 3, length]]})
    (folder / "rows.json").write_text(json.dumps(rows))
    evaluator = Evaluator(base, LORA, rows[:32], 4096)
    before = evaluator.begin(0, folder / "initial.safetensors")

    def train(dtype: str, **environment: str) -> Trained:
        job = Job(
            base_folder=str(base),
            dtype=dtype,
            lora=LORA,
            initial=str(folder / "initial.safetensors"),
            samples=str(folder / "rows.json"),
            steps=[1, STEPS - 1],
            batch=ROWS_OF_A_STEP,
            micro_batch=ROWS_OF_A_STEP,
            micro_batch_tokens=1024,
            pack_tokens=1024,
            learning_rate=1e-2,
            weight_decay=0.01,
            clip=1.0,
            seed=0,
            prompt={"template": "{instruction}{response}", "instruction": "", "response": ""},
            recipe="",
            adapter=str(folder / "adapter.safetensors"),
        )
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**ENVIRONMENT, **environment}.items():
                patch.setenv(name, value)
            (found,) = run_rounds({"ours": job}, folder, 600).values()
        assert "peak_gib" in found, found
        return load_file(job.adapter), evaluator.loss(Path(job.adapter)) / before

    return train


@pytest.fixture(scope="module")
def two_threads(train: Train) -> Trained:
    return train("float32", OMP_NUM_THREADS="2")


@pytest.fixture
def busy_loops() -> Iterator[None]:
    """Two processes that compute as long as the test does."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


def same(one: Trained, other: Trained) -> bool:
    assert one[0].keys() == other[0].keys() and len(one[0]) == 2 * 7 * 3
    return all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def test_other_programs_change_no_bit(two_threads: Trained, train: Train, busy_loops: None) -> None:
    assert two_threads[1] < 0.95  # it has learned
    assert same(two_threads, train("float32", OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive"))


def test_the_number_of_threads_changes_little(two_threads: Trained, train: Train) -> None:
    # No bit on an AMD EPYC; on a Xeon, MKL sums in another order.
    _, loss = train("float32", OMP_NUM_THREADS="1")
    assert abs(loss - two_threads[1]) < 1e-3


FORMS = {  # what each needs of the processor
    "float32, AVX2": ("avx512f", "float32", AVX2),
    "float32, kernels with SSE": ("sse4_2", "float32", {"KERNEL_CFLAGS": "-march=x86-64-v2"}),
    "bfloat16": ("", "bfloat16", {}),
    "bfloat16, AVX2": ("avx512f", "bfloat16", AVX2),
}


@pytest.mark.parametrize("form", FORMS)
def test_another_form_differs_by_little(form: str, two_threads: Trained, train: Train) -> None:
    needs, dtype, environment = FORMS[form]
    if needs and needs not in processor_flags().split():
        pytest.skip(f"this processor has no {needs}")
    trained = train(dtype, **environment)
    assert abs(trained[1] - two_threads[1]) <= TOLERANCE[dtype] * (1 - two_threads[1])
