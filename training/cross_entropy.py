"""Cross-entropy of an output layer without materializing its logits.

Gemma's vocabulary of 262,144 makes the logits the largest tensor of a step: a sample of 512 tokens has half a gigabyte
of them in float32. Here the vocabulary is processed in blocks that stay in the processor's cache, with the running
maximum and sum of FlashAttention (Dao et al., 2022, algorithm 1) in place of a second pass. The gradient of the hidden
states, where it is wanted, is computed in the same pass: the weights are frozen, so nothing else is needed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from training import kernels as c_kernels
from training.kernels import kernels_for

BLOCK = 2048  # vocabulary entries at a time: with 4096, the second product takes twice as long on two cores
ROUND = 64  # tokens are padded to a multiple: few shapes, few kernels for oneDNN to build and keep


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """Each token's `-log softmax(logits)[target]` with `logits = softcap · tanh(hidden @ weight.T / softcap)`.

    Args:
        hidden: [tokens, features], float32 or bfloat16; gets a gradient.
        weight: [vocabulary, features], the same dtype, or bfloat16 with `hidden` in float32; frozen, gets none.
        targets: [tokens], int64.
        softcap: Gemma 2's `final_logit_softcapping`; None for plain logits.

    Returns:
        [tokens], float32. Products are rounded to the dtype of `hidden`, sums are kept in float32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:  # type: ignore[no-untyped-def]
        count, with_gradient = hidden.shape[0], ctx.needs_input_grad[0]
        if weight.dtype != hidden.dtype:
            losses, gradient = _stored(hidden.contiguous(), weight, targets, softcap, with_gradient)
            ctx.save_for_backward(gradient)
            return losses
        hidden = F.pad(hidden, (0, 0, 0, -count % ROUND))
        targets = F.pad(targets, (0, -count % ROUND))
        tokens, features = hidden.shape
        maximum = hidden.new_full((tokens, 1), float("-inf"), dtype=torch.float32)
        total = hidden.new_zeros(tokens, 1, dtype=torch.float32)
        # Σ_v p(v)·weight[v], the softmax side of the gradient
        mean_weight = hidden.new_zeros(tokens, features, dtype=torch.float32)
        # Made once: fresh memory for every block would cost as much as the arithmetic.
        block_size = min(BLOCK, weight.shape[0])
        logits_of = hidden.new_empty(tokens, block_size)
        rounded_of = torch.empty_like(logits_of)
        probability_of = hidden.new_empty(tokens, block_size, dtype=torch.float32)
        part = torch.empty_like(hidden)
        kernels = kernels_for(hidden, weight) if weight.shape[0] % BLOCK % 32 == 0 else None
        factor = torch.empty_like(total)
        for start in range(0, weight.shape[0], BLOCK):
            block = weight[start : start + BLOCK]
            if kernels:
                logits = logits_of.flatten()[: tokens * len(block)].view(tokens, len(block))
                torch.mm(hidden, block.T, out=logits)
                kernels.vocabulary_softmax(
                    logits.data_ptr(),
                    maximum.data_ptr(),
                    total.data_ptr(),
                    factor.data_ptr(),
                    softcap or 0.0,
                    *logits.shape,
                )
                if not with_gradient:
                    continue
                torch.mm(logits, block, out=part)
                kernels.add_rescaled(mean_weight.data_ptr(), part.data_ptr(), factor.data_ptr(), *part.shape)
                continue
            logits, rounded, probability = (of[:, : len(block)] for of in (logits_of, rounded_of, probability_of))
            torch.mm(hidden, block.T, out=logits)
            slope = None
            if softcap:
                tanh = logits.float().div_(softcap).tanh_()
                logits, slope = tanh * softcap, 1 - tanh.square()
            new_maximum = torch.maximum(maximum, logits.amax(-1, keepdim=True).float())
            torch.sub(logits, new_maximum, out=probability).exp_()
            rescale = torch.exp(maximum - new_maximum)
            total.mul_(rescale).add_(probability.sum(-1, keepdim=True))
            maximum = new_maximum
            if not with_gradient:
                continue
            if slope is not None:
                probability.mul_(slope)
            mean_weight.mul_(rescale).add_(torch.mm(rounded.copy_(probability), block, out=part))
        if kernels and softcap:  # they keep the maximum before the capping
            maximum = torch.tanh(maximum / softcap) * softcap
        losses, gradient = _finished(hidden, weight[targets], mean_weight, maximum, total, softcap)
        ctx.save_for_backward(gradient[:count] if with_gradient else None)
        return losses[:count]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype)[:, None], None, None, None


def _stored(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses and gradient, of one call of the kernels: `hidden` in float32, `weight` in bfloat16."""
    tokens, features = hidden.shape
    maximum, total = hidden.new_full((tokens, 1), float("-inf")), hidden.new_zeros(tokens, 1)
    mean_weight = torch.zeros_like(hidden)
    c_kernels.library(hidden.dtype).vocabulary_forward(
        mean_weight.data_ptr() if with_gradient else None,
        *(part.data_ptr() for part in (maximum, total, hidden, weight)),
        softcap or 0.0,
        *(tokens, features, len(weight)),
    )
    if softcap:
        maximum = torch.tanh(maximum / softcap) * softcap
    losses, gradient = _finished(hidden, weight[targets], mean_weight, maximum, total, softcap)
    return losses, gradient if with_gradient else None


def _finished(
    hidden: Tensor, target_weight: Tensor, mean_weight: Tensor, maximum: Tensor, total: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Losses [tokens] and the gradient of `hidden`, from the sums over the vocabulary; `mean_weight` is changed."""
    target_logit = (hidden.float() * target_weight.float()).sum(-1, keepdim=True)
    target_side = target_weight
    if softcap:
        tanh = torch.tanh(target_logit / softcap)
        target_logit, target_side = tanh * softcap, target_weight * (1 - tanh.square())
    return (maximum + total.log() - target_logit)[:, 0], mean_weight.div_(total).sub_(target_side).to(hidden.dtype)
