"""The kernels of a CPU compute what torch computes, to the last bit of bfloat16 or nearly so."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, tiny_gemma
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from training import kernels
from training.cross_entropy import linear_cross_entropy
from training.fused_layers import _GatedGelu, _RMSNorm, fuse_layers
from training.packed_attention import packed_attention, use_packed_attention
from training.packing import pack

BEGINNING = list(range(10, 50))
ROWS = sorted(
    [[2, *BEGINNING, *range(100 + n, 107 + 30 * n)] for n in range(4)] + [[2, *(n % 900 for n in range(300))]]
)


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    if kernels._library() is None:
        pytest.skip("needs a C compiler and a processor with AVX-512 for bfloat16")
    yield


def both(monkeypatch: pytest.MonkeyPatch, compute: object) -> tuple[list[Tensor], list[Tensor]]:
    """What `compute` returns with the kernels, and with torch alone."""
    found = compute()  # type: ignore[operator]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_library", lambda: None)
        return found, compute()  # type: ignore[operator]


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return ((found.double() - exact.double()).abs().max() / exact.double().abs().max()).item()


def test_norm_and_gelu_round_once() -> None:
    torch.manual_seed(0)
    x, gate, up = (torch.randn(70, 96).bfloat16().requires_grad_() for _ in range(3))
    scale = torch.randn(96)
    exact_x, exact_gate, exact_up = (part.detach().double().requires_grad_() for part in (x, gate, up))
    normed = exact_x * (exact_x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + scale)
    gated = F.gelu(exact_gate, approximate="tanh") * exact_up
    fast_normed, fast_gated = _RMSNorm.apply(x, scale, 1e-6), _GatedGelu.apply(gate, up)
    for fast, exact in ((fast_normed, normed), (fast_gated, gated)):
        assert error(fast, exact) <= 2**-8  # half a unit in the last place
    weight = torch.randn(70, 96).bfloat16()
    (fast_normed * weight + fast_gated * weight).sum().backward()
    (normed * weight + gated * weight).sum().backward()
    for fast, exact in ((x, exact_x), (gate, exact_gate), (up, exact_up)):
        assert error(fast.grad, exact.grad) < 2**-7


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_output_layer(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 64).bfloat16().requires_grad_(), (torch.randn(4096 + 96, 64) * 0.3).bfloat16()
    targets = torch.randint(len(weight), (70,))
    loss = linear_cross_entropy(hidden, weight, targets, softcap)
    exact_hidden = hidden.detach().double().requires_grad_()
    logits = exact_hidden @ weight.double().T
    exact = F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=2e-3, atol=5e-3)
    loss.sum().backward()
    exact.sum().backward()
    assert error(hidden.grad, exact_hidden.grad) < 0.01


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (16, None), (None, 5.0), (16, 5.0)])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_in_tiles(window: int | None, softcap: float | None, groups: int) -> None:
    torch.manual_seed(0)
    layout = pack(ROWS).layout
    real = [place for one in layout.segments for place in range(one.start, one.start + one.length)]
    parts = [torch.randn(layout.positions.shape[1], heads, 64).bfloat16() for heads in (4, groups, groups)]
    weight = torch.randn(len(real), 4, 64).bfloat16()

    def results(dtype: torch.dtype) -> list[Tensor]:
        leaves = [part.detach().to(dtype).requires_grad_() for part in parts]
        out = packed_attention(*leaves, layout, 0.2, window, softcap)[real]
        return [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    for fast, exact in zip(results(torch.bfloat16), results(torch.float32), strict=True):
        assert error(fast, exact) < 0.01


def with_lora(family: str) -> PeftModel:
    torch.manual_seed(1)
    gemma = tiny_gemma(family, torch.bfloat16, vocab_size=1000, hidden_size=64, intermediate_size=96, head_dim=32)
    model = get_peft_model(gemma, LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:  # zero at first: the adapter would not be at work
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def hidden_and_gradients(model: PeftModel) -> list[Tensor]:
    gemma, packed = model.get_base_model(), pack(ROWS)
    model.zero_grad()
    hidden = gemma.model(
        input_ids=packed.ids, position_ids=packed.layout.positions, layout=packed.layout, use_cache=False
    ).last_hidden_state[0]
    real = [place for one in packed.layout.segments for place in range(one.start, one.start + one.length)]
    (hidden[real].float().square() * torch.linspace(0, 1, hidden.shape[-1])).mean().backward()
    return [hidden[real].detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_step_is_nearer_to_float32_than_torch_in_bfloat16(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(family)
    fuse_layers(model)
    use_packed_attention(model.get_base_model())
    fast, plain = both(monkeypatch, lambda: hidden_and_gradients(model))
    exact = hidden_and_gradients(model.float())
    assert len(fast) == len(exact) == len(plain) > 1
    assert error(fast[0], exact[0]) < 1.2 * error(plain[0], exact[0])
    fast_error, plain_error = (
        sum((one - other).double().square().sum() for one, other in zip(gradients[1:], exact[1:], strict=True))
        for gradients in (fast, plain)
    )
    assert fast_error < 1.2 * plain_error


def test_the_same_step_gives_the_same_bits_on_any_number_of_threads() -> None:
    model = with_lora("gemma3_text")
    fuse_layers(model)
    use_packed_attention(model.get_base_model())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = hidden_and_gradients(model), hidden_and_gradients(model)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_without_a_compiler_training_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(kernels, "_library", cache(kernels._library.__wrapped__))
    x = torch.randn(4, 32).bfloat16()
    assert kernels.kernels_for(x) is None
    assert "no C compiler is installed" in capsys.readouterr().out
    assert _RMSNorm.apply(x, torch.zeros(32), 1e-6).shape == x.shape
