"""QLoRA layers (Dettmers et al., 2023) over bitsandbytes' 4-bit weights, without peft's float32 copies of every input.

peft's layer saves the input of each adapter in float32 for the backward pass: on Gemma 3 270M a QLoRA step then took
twice the memory of a LoRA step. Here the input is saved once, in its own dtype, and the 4-bit weights are dequantized
in each pass.
"""

import types

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor

from training.fused_layers import is_plain_lora


def fuse_qlora_layers(model: PeftModel) -> None:
    """Replace the forward of the 4-bit LoRA layers of `model`, in place; those with dropout or DoRA keep peft's."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear4bit) and is_plain_lora(layer):
            layer.forward = types.MethodType(_forward, layer)


def _forward(self: LoraLinear4bit, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x, *args, **kwargs)
    lora_a, lora_b = self.lora_A["default"].weight, self.lora_B["default"].weight
    return _QLoraLinear.apply(x, self.base_layer.weight, lora_a, lora_b, self.scaling["default"])


class _QLoraLinear(torch.autograd.Function):
    """y = x Wᵀ + scale · (x Aᵀ) Bᵀ with W [out, in] in 4 bits, A [r, in] and B [out, r] in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Params4bit, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        a, b = lora_a.to(x.dtype), (lora_b * scale).to(x.dtype)
        low = rows @ a.T
        y = (rows @ _weight(packed, x.dtype).T).addmm_(low, b.T)
        ctx.save_for_backward(rows, a, b, low)
        ctx.packed, ctx.scale = packed, scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        rows, a, b, low = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_low = grad_rows @ b
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ _weight(ctx.packed, grad.dtype)).addmm_(grad_low, a).view(*grad.shape[:-1], -1)
        return grad_x, None, (grad_low.T @ rows).float(), (grad_rows.T @ low).float().mul_(ctx.scale), None


def _weight(packed: Params4bit, dtype: torch.dtype) -> Tensor:
    return dequantize_4bit(packed, packed.quant_state).to(dtype)
