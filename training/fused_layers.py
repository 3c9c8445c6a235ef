"""Gemma's layers with LoRA, fused: the same arithmetic in fewer passes over memory.

On a CPU, and for short samples on a GPU too, a LoRA step spends more time on casts, norms and small products than on
the frozen matrices. Each function here replaces a chain of tensor operations by one autograd node that saves only what
its backward pass needs. The formulas are those of transformers and peft, against which tests/test_fused_layers.py
compares outputs and gradients.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.activations import GELUTanh

from training.kernels import kernels_for
from training.packed_attention import packed_attention
from training.stored_weights import StoredLinear

# What transformers' classes compute, by their exact names. A class that is not named here, such as those of Gemma 3n
# with its sparse MLP, may compute something else under a name of the same kind: it keeps its own code.
_NORM_OFFSETS = {  # y = x / √(mean(x²) + eps) · (offset + weight); without a weight where `with_scale` is False
    "GemmaRMSNorm": 1,
    "Gemma2RMSNorm": 1,
    "Gemma3RMSNorm": 1,
    "VaultGemmaRMSNorm": 1,
    "Gemma4RMSNorm": 0,
    "Gemma4UnifiedRMSNorm": 0,
}
_ATTENTIONS = {  # `_attention_forward` says what
    "GemmaAttention",
    "Gemma2Attention",
    "Gemma3Attention",
    "VaultGemmaAttention",
    "Gemma4TextAttention",
    "Gemma4UnifiedTextAttention",
}
_MLPS = {  # down(act_fn(gate(x)) · up(x))
    "GemmaMLP",
    "Gemma2MLP",
    "Gemma3MLP",
    "VaultGemmaMLP",
    "Gemma4TextMLP",
    "Gemma4UnifiedTextMLP",
}


def fuse_layers(model: PeftModel) -> None:
    """Replace the forward of LoRA layers, RMS norms, attentions and gated MLPs of a Gemma by a fused one, in place.

    LoRA layers that it does not cover (dropout, DoRA, a quantized or biased base, several adapters) keep peft's, and
    classes of transformers that it does not know keep theirs.
    """
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, LoraLinear) and type(module.base_layer) is nn.Linear and is_plain_lora(module):
            module.forward = types.MethodType(_lora_forward, module)
        elif kind in _NORM_OFFSETS:
            module.forward = types.MethodType(_norm_forward, module)
        elif kind in _ATTENTIONS:
            module.forward = types.MethodType(_attention_forward, module)
        elif kind in _MLPS and isinstance(module.act_fn, GELUTanh):
            module.forward = types.MethodType(_mlp_forward, module)


def is_plain_lora(layer: Any) -> bool:
    """Whether a LoRA layer of peft computes y = x Wᵀ + scale · (x Aᵀ) Bᵀ and nothing else."""
    return (
        layer.base_layer.bias is None
        and list(layer.lora_A) == ["default"]
        and isinstance(layer.lora_dropout["default"], nn.Identity)
        and not layer.lora_bias["default"]
        and not getattr(layer, "lora_variant", {})  # DoRA and similar
    )


def _lora_forward(self: LoraLinear, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x, *args, **kwargs)
    lora_a, lora_b = self.lora_A["default"].weight, self.lora_B["default"].weight
    rows = x.reshape(-1, x.shape[-1])
    weight: Tensor = self.base_layer.weight
    multiply = _LoraLinear if weight.dtype == rows.dtype else StoredLinear
    y = multiply.apply(rows, weight, lora_a, lora_b, self.scaling["default"])
    return y.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + scale · (x Aᵀ) Bᵀ with x [rows, in], A [r, in] and B [out, r]: adapters in float32, products in the
    dtype of x."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        a, b = lora_a.to(rows.dtype), (lora_b * scale).to(rows.dtype)
        low = rows @ a.T
        y = _product(rows, weight.T).addmm_(low, b.T)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        rows, weight, a, b, low = ctx.saved_tensors
        grad_low = grad @ b
        grad_a = (grad_low.T @ rows).float()
        grad_b = (grad.T @ low).float().mul_(ctx.scale)
        grad_rows = None
        if ctx.needs_input_grad[0]:  # the first layer's input is the frozen embedding
            grad_rows = _product(grad, weight).addmm_(grad_low, a)
        return grad_rows, None, grad_a, grad_b, None


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight, in two halves where that is faster: on two cores, oneDNN's bfloat16 products of about 600 to 1300
    rows run at two thirds of the speed of smaller and larger ones."""
    count = len(rows)
    if rows.is_cuda or not 576 < count < 1280:
        return rows @ weight
    y = rows.new_empty(count, weight.shape[1])
    half = count // 2 // 32 * 32
    torch.mm(rows[:half], weight, out=y[:half])
    torch.mm(rows[half:], weight, out=y[half:])
    return y


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, _norm_scale(self), self.eps)


def _norm_scale(norm: Any) -> Tensor | None:
    """What `norm` multiplies x / √(mean(x²) + eps) by: [size], float32; None for nothing."""
    if not getattr(norm, "with_scale", True):
        return None
    offset, weight = _NORM_OFFSETS[type(norm).__name__], norm.weight.float()
    return offset + weight if offset else weight


class _RMSNorm(torch.autograd.Function):
    """y = x / √(mean(x²) + eps) · scale, computed in float32; the scale is frozen, None for 1."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor | None, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        scale = x.new_ones(x.shape[-1], dtype=torch.float32) if scale is None else scale
        if kernels := kernels_for(x):
            x = x.contiguous()
            y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
            kernels.norm_forward(
                y.data_ptr(), inverse.data_ptr(), x.data_ptr(), scale.data_ptr(), eps, inverse.numel(), x.shape[-1]
            )
            ctx.save_for_backward(x, inverse, scale)
            return y
        y = x.float()
        inverse = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, scale)
        return (y * inverse if y is x else y.mul_(inverse)).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, inverse, scale = ctx.saved_tensors
        if kernels := kernels_for(x):
            grad_x, grad = torch.empty_like(x), grad.contiguous()
            places = (part.data_ptr() for part in (grad_x, grad, x, inverse, scale))
            kernels.norm_backward(*places, inverse.numel(), x.shape[-1])
            return grad_x, None, None
        if x.is_cuda:  # CUDA's LayerNorm kernel takes no float32 scale for a bfloat16 x
            return _norm_gradient(grad, x, inverse, scale), None, None
        # With a mean of 0, the LayerNorm kernel computes this gradient in one pass, minus the mean over features of
        # scale · grad (which reaches x through the mean in LayerNorm, and not here). That is added back below.
        shape = [x.shape[-1]]
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(),
            x.contiguous(),
            shape,
            torch.zeros_like(inverse),
            inverse,
            scale,
            None,
            [True, False, False],
        )
        mean = (grad.float() @ scale).div_(x.shape[-1]).unsqueeze(-1)
        return grad_x.add_(mean.mul_(inverse)), None, None


def _norm_gradient(grad: Tensor, x: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x in y = x · inverse · scale with inverse = 1 / √(mean(x²) + eps)."""
    normed, grad_normed = x * inverse, grad * scale
    return ((grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True)) * inverse).to(x.dtype)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_GatedGelu.apply(self.gate_proj(x), self.up_proj(x)))


class _GatedGelu(torch.autograd.Function):
    """gelu(gate) · up"""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        if kernels := kernels_for(gate):
            y = torch.empty_like(gate)
            kernels.gelu_forward(y.data_ptr(), gate.data_ptr(), up.data_ptr(), y.numel())
            return y
        return F.gelu(gate, approximate="tanh") * up

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        if kernels := kernels_for(gate):
            grad, grad_gate, grad_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
            places = (tensor.data_ptr() for tensor in (grad_gate, grad_up, grad, gate, up))
            kernels.gelu_backward(*places, gate.numel())
            return grad_gate, grad_up
        activation = F.gelu(gate, approximate="tanh")
        return torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"), activation * grad


def _attention_forward(self: Any, hidden_states: Tensor, position_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' own, but for packed rows and where the kernels can norm and rotate queries and keys in one pass."""
    layout = kwargs.get("layout")
    cos, sin = position_embeddings
    if layout is None or not kernels_for(hidden_states, cos) or cos.shape[-1] != self.head_dim:
        return type(self).forward(self, hidden_states, position_embeddings, *args, **kwargs)
    query = _rotated(_heads(self, self.q_proj, hidden_states), getattr(self, "q_norm", None), cos, sin)
    if getattr(self, "is_kv_shared_layer", False):  # Gemma 4: those of an earlier layer, which gets their gradients
        key, value = (part[0].transpose(0, 1) for part in kwargs["shared_kv_states"][self.layer_type])
    else:
        key = _heads(self, self.k_proj, hidden_states)
        value = key if self.v_proj is None else _heads(self, self.v_proj, hidden_states)
        key = _rotated(key, getattr(self, "k_norm", None), cos, sin)
        value = self.v_norm(value) if hasattr(self, "v_norm") else value
    if getattr(self, "store_full_length_kv", False):
        kwargs["shared_kv_states"][self.layer_type] = tuple(part.transpose(0, 1)[None] for part in (key, value))
    softcap = getattr(self, "attn_logit_softcapping", None)
    out = packed_attention(query, key, value, layout, self.scaling, getattr(self, "sliding_window", None), softcap)
    return self.o_proj(out.flatten(1)[None]), None


def _heads(attention: Any, projection: nn.Module, hidden_states: Tensor) -> Tensor:
    """[1, tokens, hidden] → [tokens, heads, size]."""
    return projection(hidden_states)[0].unflatten(-1, (-1, attention.head_dim))


def _rotated(x: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    scale, eps = (None, 0.0) if norm is None else (_norm_scale(norm), norm.eps)
    return _Rope.apply(x, scale, eps, cos, sin)


class _Rope(torch.autograd.Function):
    """Rotary embedding of x [tokens, heads, size], with a scale after its RMSNorm; cos and sin [1, tokens, size]."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        kernels = kernels_for(x)
        assert kernels is not None
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        place = None if scale is None else scale.data_ptr()
        kernels.rope_forward(
            y.data_ptr(), inverse.data_ptr(), x.data_ptr(), place, eps, cos.data_ptr(), sin.data_ptr(), *x.shape
        )
        ctx.save_for_backward(x, inverse, scale, cos, sin)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, inverse, scale, cos, sin = ctx.saved_tensors
        kernels = kernels_for(x)
        assert kernels is not None
        grad_x, grad = torch.empty_like(x), grad.contiguous()
        kernels.rope_backward(
            grad_x.data_ptr(),
            grad.data_ptr(),
            x.data_ptr(),
            inverse.data_ptr(),
            None if scale is None else scale.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            *x.shape,
        )
        return grad_x, None, None, None, None
