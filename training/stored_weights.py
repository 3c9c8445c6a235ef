"""Frozen matrices in bfloat16 where a processor computes in float32.

Gemma's weights are published in bfloat16. A processor without arithmetic for it is to compute in float32, but need not
keep the matrices so: kernels_linear.h widens them where it multiplies. Every number stays what it was, in half of the
memory, and the products with their LoRA are faster than torch's.
"""

from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.load_model import load_base
from training import kernels

# Embeddings by the exact names of their classes: rows of a table, times `scalar_embed_scale` where they have one.
_EMBEDDINGS = {
    "Embedding",
    "GemmaTextScaledWordEmbedding",
    "Gemma2TextScaledWordEmbedding",
    "Gemma3TextScaledWordEmbedding",
    "Gemma4TextScaledWordEmbedding",
    "Gemma4UnifiedTextScaledWordEmbedding",
    "VaultGemmaTextScaledWordEmbedding",
}
RANKS = 32  # columns of an adapter's matrices are filled up to a multiple


def can_store(folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a base in `folder`, computed with in `dtype`, is kept in bfloat16: all its files are."""
    if dtype != torch.float32 or device.type != "cpu" or not kernels.library(dtype):
        return False
    files = list(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as weights:
            if any(weights.get_slice(name).get_dtype() != "BF16" for name in weights.keys()):  # noqa: SIM118
                return False
    return bool(files)


def stored_elements(base: PreTrainedModel) -> int:
    """How many weights of `base`, in bfloat16 and on any device, `load_stored` keeps in it."""
    weights = {id(part.weight): part.weight for part in base.modules() if _is_stored(part)}
    return sum(weight.numel() for weight in weights.values())


def load_stored(folder: Path) -> PreTrainedModel:
    """The base in `folder` as `load_base` gives it in float32, but its embeddings and linear layers are in bfloat16.

    They take and return float32. What else there is, norms and experts for example, is float32.
    """
    base = load_base(folder, torch.bfloat16, None, torch.device("cpu"))
    module: Any
    unknown = {id(part.weight) for part in base.modules() if isinstance(part, nn.Embedding) and not _is_stored(part)}
    stored: list[Any] = [part for part in base.modules() if _is_stored(part) and id(part.weight) not in unknown]
    kept = {id(module.weight) for module in stored}  # an output layer shares the embedding's
    for module in base.modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and value.dtype == torch.bfloat16 and id(value) not in kept:
                value.data = value.data.float()
                if name == "embed_scale":  # made in bfloat16, not read from a file
                    value.data.fill_(module.scalar_embed_scale)
    for module in stored:
        module.forward = MethodType(_rows if isinstance(module, nn.Embedding) else _linear_forward, module)
    base.config.dtype = torch.float32
    return base


def _is_stored(module: Any) -> bool:
    if isinstance(module, nn.Embedding):
        known = type(module).__name__ in _EMBEDDINGS
    else:
        known = type(module) is nn.Linear and module.bias is None
    # The kernels take sizes of multiples of 32.
    return known and module.weight.dtype == torch.bfloat16 and not any(size % 32 for size in module.weight.shape)


def _rows(self: Any, ids: Tensor) -> Tensor:
    return F.embedding(ids, self.weight).float() * getattr(self, "embed_scale", 1)


def _linear_forward(self: Any, x: Tensor) -> Tensor:
    return StoredLinear.apply(x.reshape(-1, x.shape[-1]), self.weight, None, None, 0.0).view(*x.shape[:-1], -1)


class StoredLinear(torch.autograd.Function):
    """y = x Wᵀ + scale · (x Aᵀ) Bᵀ with x [rows, in], W [out, in] in bfloat16, A [r, in] and B [out, r], or neither."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        x, (outs, ins) = x.contiguous(), weight.shape
        y, rank, low, a, b = x.new_empty(len(x), outs), 0, None, None, None
        if lora_a is not None and lora_b is not None:
            rank, a, b = len(lora_a), lora_a.contiguous(), (lora_b * scale).T.contiguous()
            low = x.new_empty(len(x), -(-rank // RANKS) * RANKS)
        inner = _filled(a)
        kernels.library(x.dtype).lora_forward(
            *_places(y, low, x, weight, inner, b), len(x), ins, outs, rank, _width(low)
        )
        ctx.save_for_backward(x if rank else None, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, weight, a, b, low = ctx.saved_tensors
        grad, (outs, ins) = grad.contiguous(), weight.shape
        grad_x = grad.new_empty(len(grad), ins) if ctx.needs_input_grad[0] else None
        grad_a, grad_b, grad_low = (None if part is None else torch.empty_like(part) for part in (a, b, low))
        inner = _filled(b)
        kernels.library(grad.dtype).lora_backward(
            *_places(grad_x, grad_a, grad_b, grad_low, grad, x, low, weight, inner, a),
            *(len(grad), ins, outs, 0 if a is None else len(a), _width(low)),
        )
        return grad_x, None, grad_a, None if grad_b is None else grad_b.T * ctx.scale, None


def _filled(matrix: Tensor | None) -> Tensor | None:
    """[rank, size] → [size, rank, rounded up]: its transpose, with zeros."""
    return None if matrix is None else F.pad(matrix, (0, 0, 0, -len(matrix) % RANKS)).T.contiguous()


def _width(low: Tensor | None) -> int:
    return 0 if low is None else low.shape[1]


def _places(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
