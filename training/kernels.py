"""kernels.c for torch: the small operations of a LoRA step on a CPU, each in one pass over memory.

In torch's own operations, casts, norms, activations, softmaxes and copies take more of a step than the frozen matrices'
products. On a GPU, in another dtype than float32 and bfloat16, or without a compiler, every caller uses torch.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.c_build import NoLibrary, compiled

SOURCE = Path(__file__).with_name("kernels.c")
DTYPE_FLAGS = {torch.float32: ["-fopenmp"], torch.bfloat16: ["-fopenmp", "-DBFLOAT16"]}
NO_AMX = ["-mno-amx-bf16", "-mno-amx-tile"]
# What each takes: p a pointer (None: not given), i an int32, l a ptrdiff_t, f a float32.
FUNCTIONS = {
    "norm_forward": "ppppfii",
    "norm_backward": "pppppii",
    "rope_forward": "ppppfppiii",
    "rope_backward": "pppppppiii",
    "gelu_forward": "pppl",
    "gelu_backward": "pppppl",
    "vocabulary_softmax": "ppppfii",
    "add_rescaled": "pppii",
    "attention_forward": "ppppp",
    "attention_backward": "ppppppppp",
}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_ssize_t, "f": ctypes.c_float}


class Attention(ctypes.Structure):
    """See kernels_attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("item", "query", "key", "bias")),
        *((name, ctypes.c_int32) for name in ("items", "heads", "groups", "size", "padding")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
    )


def kernels_for(*tensors: Tensor) -> Any:
    """The library that computes with `tensors`; None: use torch.

    All of them have to be float32 or all bfloat16, in main memory, with rows of a multiple of 32.
    """
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.shape[-1] % 32:
            return None
    return library(dtype) if dtype in DTYPE_FLAGS else None


@cache
def library(dtype: torch.dtype) -> Any:
    """kernels.c for this processor and elements of `dtype`, or None: there is no compiler, or no OpenMP of torch's."""
    try:
        return load(DTYPE_FLAGS[dtype])
    except NoLibrary as reason:
        print(f"Training without kernels of its own, and so more slowly: {reason}", flush=True)
        return None


def load(flags: Sequence[str]) -> Any:
    """kernels.c compiled with `flags`.

    Raises:
        NoLibrary: there is no compiler, it failed, or torch has no OpenMP whose threads the kernels could use.
    """
    ctypes.CDLL(_openmp(), mode=ctypes.RTLD_GLOBAL)
    library: Any = compiled(SOURCE, flags)
    if not library.can_run():  # the processor has AMX, and the system does not let this process use it
        library = compiled(SOURCE, [*flags, *NO_AMX])
    for name, letters in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in letters], None
    library.form.restype = ctypes.c_char_p
    return library


def form(dtype: torch.dtype) -> str:
    """The form of the kernels that compute with elements of `dtype`, such as `AVX2`; `none` where torch does."""
    found = library(dtype)
    return found.form().decode() if found else "none"


def _openmp() -> str:
    """The file of GNU OpenMP that torch has loaded: its own, or the system's where torch was built there."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return next(line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line)
    except (OSError, StopIteration):
        raise NoLibrary("torch uses another OpenMP than GNU's") from None
