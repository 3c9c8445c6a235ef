"""kernels.c for torch: the small operations of a LoRA step on a CPU that computes in bfloat16, where it can.

In torch's own operations, casts, norms, activations, softmaxes and copies take more of a step than the frozen matrices'
products. Without a compiler or AVX-512 for bfloat16, on a GPU or in float32, every caller keeps to torch.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.c_build import NoLibrary, compiled, processor_flags

SOURCE = Path(__file__).with_name("kernels.c")
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}
# What each takes: p a pointer (None: not given), i an int32, l a ptrdiff_t, f a float32.
FUNCTIONS = {
    "norm_forward": "ppppfii",
    "norm_backward": "pppppii",
    "turn_forward": "ppppfppiii",
    "turn_backward": "pppppppiii",
    "gelu_forward": "pppl",
    "gelu_backward": "pppppl",
    "vocabulary_softmax": "ppppfii",
    "add_rescaled": "pppii",
}
ON_TILES = {"attention_forward": "ppppp", "attention_backward": "ppppppppp"}  # where the processor has AMX


class Attention(ctypes.Structure):
    """See kernels.c."""

    _fields_ = (
        ("item", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("items", "heads", "groups", "size", "padding")),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_ssize_t, "f": ctypes.c_float}


def kernels_for(*tensors: Tensor) -> Any:
    """The library, if it can compute with `tensors`: bfloat16 in main memory, rows of a multiple of 32; or None.

    Its `has_amx` says whether the functions ON_TILES are there.
    """
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu" or tensor.shape[-1] % 32:
            return None
    return _library()


@cache
def _library() -> Any:
    openmp = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
    if openmp is None or not NEEDED.issubset(processor_flags().split()):
        return None
    ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)  # torch's own pool of threads
    library: Any
    try:
        library = compiled(SOURCE, ["-fopenmp"])
    except NoLibrary as reason:
        print(f"Training without kernels of its own, and so more slowly: {reason}", flush=True)
        return None
    library.has_amx = bool(library.may_use_amx())
    for name, letters in (FUNCTIONS | ON_TILES if library.has_amx else FUNCTIONS).items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in letters], None
    return library
