"""kernels.c for torch: the small operations of a LoRA step on a CPU that computes in bfloat16, where it can.

Measured with Gemma 3 270M on two cores of a Xeon: of a step in torch's own operations, the frozen matrices' products are
a third; casts, norms, activations and softmaxes are most of the rest. Where there is no compiler, no AVX-512 with
bfloat16, on a GPU or in float32, every caller keeps to torch.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from training.c_library import NoLibrary, compiled, processor_flags

SOURCE = Path(__file__).with_name("kernels.c")
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}
# What each takes: p a pointer (None: not given), i an int32, l a ptrdiff_t, f a float32.
FUNCTIONS = {
    "norm_forward": "pppppfii",
    "norm_backward": "pppppii",
    "turn_forward": "ppppfppiii",
    "turn_backward": "pppppppiii",
    "gelu_forward": "pppl",
    "gelu_backward": "pppppl",
    "attention_softmax": "pppffiiii",
    "vocabulary_softmax": "ppppfii",
    "add_rescaled": "pppii",
}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_ssize_t, "f": ctypes.c_float}


def kernels_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels, if they can compute with `tensors`: bfloat16 in main memory, rows of a multiple of 32."""
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu" or tensor.shape[-1] % 32:
            return None
    return _library()


@cache
def _library() -> ctypes.CDLL | None:
    openmp = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
    if openmp is None or not set(processor_flags().split()) >= NEEDED:
        return None
    ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)  # torch's own pool of threads
    try:
        library = compiled(SOURCE, ["-fopenmp"])
    except NoLibrary as reason:
        print(f"Training without kernels of its own, at half the speed: {reason}", flush=True)
        return None
    for name, letters in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in letters], None
    return library
