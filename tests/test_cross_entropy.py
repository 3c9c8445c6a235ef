"""The output layer without logits gives what the plain one gives."""

import pytest
import torch
import torch.nn.functional as F

from training.cross_entropy import BLOCK, linear_cross_entropy
from training.kernels import library


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocabulary", [BLOCK // 2, BLOCK, 3 * BLOCK + 17])
def test_loss_and_gradient_equal_plain_cross_entropy(vocabulary: int, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 64, requires_grad=True)
    weight = torch.randn(vocabulary, 64)
    targets = torch.randint(vocabulary, (37,))
    shares = torch.rand(37)  # of the tokens in what is minimized

    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    plain = F.cross_entropy(logits, targets, reduction="none")
    (plain_grad,) = torch.autograd.grad(plain @ shares, hidden)
    loss = linear_cross_entropy(hidden, weight, targets, softcap)
    (grad,) = torch.autograd.grad(loss @ shares, hidden)

    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-4, atol=1e-4)


def test_targets_with_zero_probability_have_a_finite_loss() -> None:
    hidden = torch.full((1, 8), 10.0, requires_grad=True)
    weight = torch.zeros(BLOCK + 1, 8)
    weight[0], weight[-1] = 10.0, -10.0
    loss = linear_cross_entropy(hidden, weight, torch.tensor([BLOCK]))
    loss.backward()
    assert loss.item() == pytest.approx(1600, rel=1e-4)
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_bfloat16_stays_close_to_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 128), torch.randn(5000, 128) * 0.1
    targets = torch.randint(5000, (64,))
    exact = linear_cross_entropy(hidden, weight, targets).sum()
    rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets).sum()
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-3)


@pytest.mark.skipif(not library(torch.float32), reason="no C compiler is installed")
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_words_of_no_probability_are_left_out_of_the_gradient_alone(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(50, 128, requires_grad=True)
    weight = (torch.randn(20_000, 128) * 0.5).bfloat16()  # logits from -20 to 20, as a Gemma's are
    targets = torch.randint(20_000, (50,))
    logits = hidden.double() @ weight.double().T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    assert (logits.softmax(-1) < 1e-8).double().mean() > 0.5  # most words
    exact = F.cross_entropy(logits, targets, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), hidden)
    loss = linear_cross_entropy(hidden, weight, targets, softcap)
    (grad,) = torch.autograd.grad(loss.sum(), hidden)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-5)
    assert 1e-7 < (grad - exact_grad).norm() / exact_grad.norm() < 2e-4
