"""Both C files compile for Arm, and what the training kernels compute there is what they compute here.

Needs a cross compiler and, to run what it makes, an emulator: Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and
qemu-user.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from core.c_build import FLAGS
from serving.engine import kernels as serving_kernels
from training import kernels as training_kernels

COMPILER = shutil.which("aarch64-linux-gnu-gcc") or ""
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static") or ""
AARCH64 = 183  # EM_AARCH64 of elf.h
HARNESS = Path(__file__).with_name("kernel_harness.c")
PORTABLE = [flag for flag in FLAGS if not flag.startswith("-march")]
TARGETS = pytest.mark.parametrize("target", ["armv8.2-a", "armv8.6-a+bf16"])
DTYPES = pytest.mark.parametrize("dtype", training_kernels.DTYPE_FLAGS)
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no aarch64-linux-gnu-gcc is installed")


def machine_of(file: Path) -> int:
    """What an ELF file is for: `e_machine`, the half word at byte 18 of its header."""
    header = file.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    return int.from_bytes(header[18:20], "little")


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_compiler
@TARGETS
@DTYPES
@pytest.mark.slow
def test_training_kernels_compile(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    flags = [*PORTABLE, *training_kernels.DTYPE_FLAGS[dtype], f"-march={target}"]
    run(COMPILER, *flags, "-c", training_kernels.SOURCE, "-o", tmp_path / "kernels.o")
    assert machine_of(tmp_path / "kernels.o") == AARCH64


@needs_compiler
@TARGETS
@pytest.mark.slow
def test_serving_kernels_compile(target: str, tmp_path: Path) -> None:
    flags = [flag for flag in serving_kernels.FLAGS if not flag.startswith("-mprefer-vector-width")]  # x86-64's own
    run(COMPILER, *PORTABLE, *flags, f"-march={target}", "-c", serving_kernels.SOURCE, "-o", tmp_path / "kernels.o")
    assert machine_of(tmp_path / "kernels.o") == AARCH64


@needs_compiler
@pytest.mark.skipif(not EMULATOR, reason="no qemu-aarch64 is installed")
@TARGETS
@DTYPES
@pytest.mark.slow
def test_training_kernels_compute_the_same(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    flags = [flag for flag in training_kernels.DTYPE_FLAGS[dtype] if flag != "-fopenmp"]
    flags += [*PORTABLE, "-w", "-I", str(training_kernels.SOURCE.parent), str(HARNESS), "-lm"]
    run("cc", *flags, "-o", tmp_path / "here")
    run(COMPILER, *flags, f"-march={target}", "-static", "-o", tmp_path / "there")
    here, there = run(tmp_path / "here").split(), run(EMULATOR, "-cpu", "max", tmp_path / "there").split()
    names, other_names = here[::2], there[::2]
    assert names == other_names and len(names) > 30_000
    exact, found = (torch.tensor(list(map(float, numbers[1::2]))) for numbers in (here, there))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for name in sorted(set(names)):
        which = torch.tensor([one == name for one in names])
        torch.testing.assert_close(
            found[which], exact[which], rtol=tolerance, atol=tolerance * exact[which].std().item()
        )
