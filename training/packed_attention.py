"""Attention over packed samples, which keeps them apart (training/packing.py says where they lie).

On a GPU it is FlexAttention with the layout's mask. On a CPU it is one call of kernels.c, or the same blocks in torch's
own operations where the kernels do not run.
"""

from collections.abc import Callable
from ctypes import byref
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, PreTrainedModel

from core.errors import UserError
from training.kernels import kernels_for
from training.packing import Block, Layout, compiled


def use_packed_attention(gemma: PreTrainedModel) -> str:
    """Make `gemma` take `layout=` (a `packing.Layout`) in its forward pass.

    Returns:
        The name of the attention it had, for `gemma.set_attn_implementation`.

    Raises:
        UserError: its tokens see later ones.
    """
    if getattr(gemma.config, "use_bidirectional_attention", None) in (True, "all"):  # "vision": within images
        raise UserError(
            "this model attends to later tokens (use_bidirectional_attention in its config.json) and writes no text: "
            "pass a Gemma that does, by MODEL or model.path"
        )
    before: str = gemma.config._attn_implementation
    gemma.set_attn_implementation("packed")
    return before


def _attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    layout: Layout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, size], key and value [1, groups, tokens, size]; the
    output is [1, tokens, heads, size]."""
    if query.is_cuda:
        return _flex_attention(query, key, value, layout, scaling, sliding_window, softcap), None
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return packed_attention(query, key, value, layout, scaling, sliding_window, softcap)[None], None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of packed samples on a CPU: softmax(scale · Q Kᵀ) V.

    Args:
        query: [tokens, heads, size], float32 or bfloat16.
        key, value: [tokens, groups, size], the same dtype; `heads` is a multiple of `groups`.
        window: of sliding attention, in tokens, the query's own included; None for full attention.
        softcap: Gemma 2's `attn_logit_softcapping`: scores become softcap · tanh(score / softcap).

    Returns:
        [tokens, heads, size]; padding gets zeros.
    """
    if kernels_for(query, key, value):
        return _KernelAttention.apply(query, key, value, layout.tables(window), scale, softcap)
    return _SegmentAttention.apply(query, key, value, layout.blocks(window), scale, softcap)


AttentionInterface.register("packed", _attention_interface)


def _flex_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    flex: Any = compiled(flex_attention) if query.is_cuda else flex_attention
    out = flex(
        query,
        key,
        value,
        score_mod=_soft_cap(softcap) if softcap else None,
        block_mask=layout.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


@cache
def _soft_cap(limit: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return capped


class _SegmentAttention(torch.autograd.Function):
    """softmax(scale · Q Kᵀ) V block by block: query [tokens, heads, size], key and value [tokens, groups, size].

    PyTorch's own attention on a CPU has a backward pass several times slower than these products, and needs sequences
    of equal length. Only the inputs are kept; the backward pass recomputes the probabilities (FlashAttention, Dao et
    al., 2022, algorithm 4). Products are rounded to the dtype of the inputs, the softmax is in float32.
    """

    @staticmethod
    def forward(ctx, query, key, value, blocks, scale, softcap):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(query, key, value)
        ctx.arguments = blocks, scale, softcap
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for block in blocks:
            probability, _ = _probability(
                block.gather_queries(query, key), block.gather_keys(key), block, scale, softcap
            )
            block.scatter_queries(out, probability.to(query.dtype) @ block.gather_keys(value))
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value = ctx.saved_tensors
        blocks, scale, softcap = ctx.arguments
        grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
        grad_key, grad_value = (torch.zeros_like(part, dtype=torch.float32) for part in (key, value))
        for block in blocks:
            queries, keys, values = block.gather_queries(query, key), block.gather_keys(key), block.gather_keys(value)
            grads = block.gather_queries(grad, key)  # zero for padding: nothing reads its output
            probability, slope = _probability(queries, keys, block, scale, softcap)
            block.add_keys(grad_value, probability.to(grad.dtype).mT @ grads)
            grad_score = torch._softmax_backward_data((grads @ values.mT).float(), probability, -1, torch.float32)
            if slope is not None:
                grad_score.mul_(slope)
            grad_score = grad_score.mul_(scale).to(grad.dtype)
            block.scatter_queries(grad_query, grad_score @ keys)
            block.add_keys(grad_key, grad_score.mT @ queries)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


class _KernelAttention(torch.autograd.Function):
    """`_SegmentAttention` by kernels.c: one call, scores in float32 from the product on.

    Forward and backward of packs of 1,200 to 2,500 tokens (Gemma 3 270M, one core of a Zen 5) take a third of the time
    of `_SegmentAttention` in float32, 0.55 to 0.63 of it where both are confined to AVX2, and 0.75 in bfloat16.
    """

    @staticmethod
    def forward(ctx, query, key, value, tables, scale, softcap):  # type: ignore[no-untyped-def]
        query, key, value = (part.contiguous() for part in (query, key, value))
        ctx.save_for_backward(query, key, value)
        ctx.arguments = tables, scale, softcap
        out = torch.zeros_like(query)
        kernels_for(query).attention_forward(
            *(part.data_ptr() for part in (out, query, key, value)), byref(tables.arguments(query, key, scale, softcap))
        )
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value = ctx.saved_tensors
        tables, scale, softcap = ctx.arguments
        grad, grad_query = grad.contiguous(), torch.zeros_like(query)
        grad_key, grad_value = (torch.zeros_like(part, dtype=torch.float32) for part in (key, value))
        sums = torch.empty(tables.sums, 2, *key.shape[1:])
        kernels_for(query).attention_backward(
            *(part.data_ptr() for part in (grad_query, grad_key, grad_value, sums, grad, query, key, value)),
            byref(tables.arguments(query, key, scale, softcap)),
        )
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _probability(
    queries: Tensor, keys: Tensor, block: Block, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax over visible keys, [segments · groups, count · heads per group, keys], and the soft-capping's slope."""
    score = (queries @ keys.mT).unflatten(1, (block.queries.shape[1], -1))
    slope = None
    if softcap:
        tanh = score.float().mul_(scale / softcap).tanh_()
        slope = (1 - tanh.square()).flatten(1, 2)
        score, scale = tanh, softcap
    score = torch.add(block.bias, score, alpha=scale)
    return torch.softmax(score, -1).flatten(1, 2), slope
