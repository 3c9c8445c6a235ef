"""The same Gemma and LoRA arithmetic in fewer passes over memory.

On a CPU, and for short rows on a GPU too, a LoRA step spends more time on casts, norms and small products than on
the frozen matrices. Each function here replaces a chain of tensor operations by one autograd node that saves only
what its backward pass needs. Formulas are those of transformers and peft; tests hold them to it.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from training.kernels import kernels_for
from training.packing import attend


def speed_up(model: PeftModel) -> None:
    """Give the LoRA layers, RMS norms, attentions and gated MLPs of a Gemma their faster forward, in place.

    Layers this does not hold for (dropout, DoRA, quantized or biased base, several adapters) keep peft's own.
    """
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, LoraLinear) and type(module.base_layer) is nn.Linear and is_plain(module):
            module.forward = types.MethodType(_lora_forward, module)
        elif kind.startswith("Gemma") and kind.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm_forward, module)
        elif kind.startswith("Gemma") and kind.endswith("Attention"):
            module.forward = types.MethodType(_attention_forward, module)
        elif kind.startswith("Gemma") and kind.endswith("MLP") and module.config.hidden_activation in _TANH_GELU:
            module.forward = types.MethodType(_mlp_forward, module)


_TANH_GELU = ("gelu_pytorch_tanh", None)  # None: Gemma 1's early configurations, which mean the same


def is_plain(layer: Any) -> bool:
    """Whether a LoRA layer of peft does nothing but y = x Wᵀ + scale · (x Aᵀ) Bᵀ."""
    return (
        layer.base_layer.bias is None
        and list(layer.lora_A) == ["default"]
        and isinstance(layer.lora_dropout["default"], nn.Identity)
        and not layer.lora_bias["default"]
        and not getattr(layer, "lora_variant", {})  # DoRA and its kin
    )


def _lora_forward(self: LoraLinear, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x, *args, **kwargs)
    lora_a, lora_b = self.lora_A["default"].weight, self.lora_B["default"].weight
    return _LoraLinear.apply(x, self.base_layer.weight, lora_a, lora_b, self.scaling["default"])


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + scale · (x Aᵀ) Bᵀ with A [r, in] and B [out, r] in float32, products in the dtype of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        a, b = lora_a.to(x.dtype), (lora_b * scale).to(x.dtype)
        low = rows @ a.T
        y = _product(rows, weight.T).addmm_(low, b.T)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        rows, weight, a, b, low = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_low = grad_rows @ b
        grad_a = (grad_low.T @ rows).float()
        grad_b = (grad_rows.T @ low).float().mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:  # the first layer's input is the frozen embedding
            grad_x = _product(grad_rows, weight).addmm_(grad_low, a).view(*grad.shape[:-1], -1)
        return grad_x, None, grad_a, grad_b, None


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight. oneDNN's bfloat16 products of some 600 to 1300 rows run at two thirds of the speed that they have
    below and above, on two cores: those are done in halves."""
    count = len(rows)
    if rows.is_cuda or not 576 < count < 1280:
        return rows @ weight
    y = rows.new_empty(count, weight.shape[1])
    half = count // 2 // 32 * 32
    torch.mm(rows[:half], weight, out=y[:half])
    torch.mm(rows[half:], weight, out=y[half:])
    return y


def _norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """y = x / √(mean(x²) + eps) · (1 + weight), in float32 inside; the weight is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        if kernels := kernels_for(x):
            x, scale = x.contiguous(), 1 + weight.float()
            y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
            kernels.norm_forward(
                y.data_ptr(), inverse.data_ptr(), x.data_ptr(), scale.data_ptr(), eps, inverse.numel(), x.shape[-1]
            )
            ctx.save_for_backward(x, inverse, scale)
            return y
        y = x.float()
        inverse = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        scale = 1 + weight.float()
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
        if x.is_cuda:  # whose kernel for LayerNorm takes no float32 scale for a bfloat16 x
            return _norm_gradient(grad, x, inverse, scale), None, None
        # LayerNorm's own kernel, told that the mean is 0, computes this gradient in one pass, less the mean over
        # features of scale · grad (which reaches x through the mean in LayerNorm, and not here).
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
    """Of x in y = x · inverse · scale with inverse = 1 / √(mean(x²) + eps)."""
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
    if layout is None or not kernels_for(hidden_states, cos) or cos.shape[-1] % 32:
        return type(self).forward(self, hidden_states, position_embeddings, *args, **kwargs)
    query, key, value = (
        part(hidden_states)[0].unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj)
    )
    query = _Rope.apply(query, getattr(self, "q_norm", None), cos, sin)
    key = _Rope.apply(key, getattr(self, "k_norm", None), cos, sin)
    softcap = getattr(self, "attn_logit_softcapping", None)
    out = attend(query, key, value, layout, self.scaling, getattr(self, "sliding_window", None), softcap)
    return self.o_proj(out.flatten(1)[None]), None


class _Rope(torch.autograd.Function):
    """Rotary embedding of x [tokens, heads, size] after its RMSNorm, if it has one; cos and sin [1, tokens, size]."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        kernels = kernels_for(x)
        assert kernels is not None
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        scale, eps = (None, 0.0) if norm is None else (1 + norm.weight.float(), norm.eps)
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
        return grad_x, None, None, None
