"""The kernels of a CPU compute what torch computes, in each form that this machine can run and each dtype."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, tiny_gemma
from kernel_forms import forms
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_gemma4 import KINDS, even_gemma4
from torch import Tensor

from core.c_build import NoLibrary
from training import kernels
from training.cross_entropy import linear_cross_entropy
from training.fused_layers import _GatedGelu, _RMSNorm, _Rope, fuse_layers
from training.packed_attention import packed_attention, use_packed_attention
from training.packing import pack
from training.stored_weights import StoredLinear

BEGINNING = list(range(10, 50))
ROWS = sorted(
    [[2, *BEGINNING, *range(100 + n, 107 + 30 * n)] for n in range(4)] + [[2, *(n % 900 for n in range(300))]]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# The largest difference from float64, as a share of the largest number. Half a unit in the last place of bfloat16 is
# 2⁻⁹ to 2⁻⁸ of a number; for float32 there is room for the roundings of a sum.
ROUNDED_ONCE = {torch.float32: 4e-7, torch.bfloat16: 2**-8}
GRADIENT = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
PRODUCTS = {torch.float32: 5e-6, torch.bfloat16: 0.01}  # chains of products and softmax

COMPILED = kernels.library


@cache
def _load(form: str, dtype: torch.dtype) -> object:
    return kernels.load([*kernels.DTYPE_FLAGS[dtype], *forms()[form]])


@pytest.fixture(autouse=True, params=forms())
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Computes with the kernels in one form."""
    try:
        _load(request.param, torch.float32)
    except NoLibrary as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(kernels, "library", lambda dtype: _load(request.param, dtype))
    yield request.param


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return ((found.double() - exact.double()).abs().max() / exact.double().abs().max()).item()


def errors(fast: Callable[..., Tensor], plain: Callable[..., Tensor], parts: list[Tensor]) -> tuple[float, float]:
    """Largest of `fast` and of its gradients, against `plain` in float64; NaN where one of them is."""
    parts = [part.requires_grad_() for part in parts]
    exact_parts = [part.detach().double().requires_grad_() for part in parts]
    found, exact = fast(*parts), plain(*exact_parts)
    weight = torch.randn(exact.shape).to(found.dtype)
    gradients = torch.autograd.grad((found * weight).sum(), parts)
    exact_gradients = torch.autograd.grad((exact * weight).sum(), exact_parts)
    backward = [error(one, other) for one, other in zip(gradients, exact_gradients, strict=True)]
    return error(found, exact), torch.tensor(backward, dtype=torch.float64).max().item()  # Python's max may lose a NaN


def normed(x: Tensor, scale: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale


@DTYPES
@pytest.mark.parametrize(("size", "with_weight"), [(32, True), (96, True), (640, True), (512, False)])
def test_norm(size: int, with_weight: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(70, size).to(dtype), torch.randn(size) if with_weight else None
    forward, backward = errors(
        lambda x: _RMSNorm.apply(x, weight, 1e-6),
        lambda x: normed(x, torch.ones(size) if weight is None else weight),
        [x],
    )
    assert forward <= ROUNDED_ONCE[dtype] and backward <= GRADIENT[dtype]


@DTYPES
def test_gated_gelu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(70, 96).mul(3).to(dtype) for _ in range(2))
    forward, backward = errors(
        _GatedGelu.apply,
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        [gate, up],
    )
    assert forward <= 2 * ROUNDED_ONCE[dtype] and backward <= GRADIENT[dtype]


@DTYPES
def test_gated_gelu_of_large_numbers(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -300, -88, -20, -0.0, 0, 20, 88, 300, 1e4] * 16).to(dtype)
    y = _GatedGelu.apply(gate, torch.ones_like(gate))
    torch.testing.assert_close(y, gate.clamp_min(0), rtol=0, atol=1e-7)


@DTYPES
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_rope(size: int, with_norm: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, heads, scale = 50, 3, torch.randn(size) if with_norm else None
    angle = (torch.arange(tokens)[:, None] * 0.1 ** torch.linspace(0, 3, size // 2)).repeat(1, 2)
    cos, sin = (part[None].to(dtype) for part in (angle.cos(), angle.sin()))

    def plain(x: Tensor) -> Tensor:
        if scale is not None:
            x = normed(x, scale)
        swapped = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos[0, :, None].double() + swapped * sin[0, :, None].double()

    x = torch.randn(tokens, heads, size).to(dtype)
    forward, backward = errors(lambda x: _Rope.apply(x, scale, 1e-6, cos, sin), plain, [x])
    assert forward <= ROUNDED_ONCE[dtype] and backward <= GRADIENT[dtype]


@DTYPES
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_output_layer(softcap: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 64).to(dtype), (torch.randn(4096 + 96, 64) * 0.3).to(dtype)
    targets = torch.randint(len(weight), (70,))

    def plain(hidden: Tensor) -> Tensor:
        logits = hidden @ weight.double().T
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return F.cross_entropy(logits, targets, reduction="none")

    forward, backward = errors(
        lambda hidden: linear_cross_entropy(hidden, weight, targets, softcap),
        plain,
        [hidden],
    )
    assert forward <= PRODUCTS[dtype] and backward <= PRODUCTS[dtype]


@pytest.mark.parametrize(
    ("rows", "ins", "outs", "rank"), [(5, 64, 96, 8), (70, 96, 64, 0), (200, 352, 32, 33), (1, 32, 544, 1)]
)
def test_a_matrix_stored_in_bfloat16_and_its_lora(rows: int, ins: int, outs: int, rank: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(outs, ins).bfloat16()
    parts = [torch.randn(rows, ins), *([torch.randn(rank, ins), torch.randn(outs, rank)] if rank else [])]

    def fast(x: Tensor, *lora: Tensor) -> Tensor:
        return StoredLinear.apply(x, weight, *(lora or (None, None)), 0.7)

    def plain(x: Tensor, *lora: Tensor) -> Tensor:
        return x @ weight.double().T + (0.7 * (x @ lora[0].T) @ lora[1].T if lora else 0)

    forward, backward = errors(fast, plain, parts)
    assert forward <= PRODUCTS[torch.float32] and backward <= PRODUCTS[torch.float32]


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_an_output_layer_stored_in_bfloat16(softcap: float | None, tokens: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 64), (torch.randn(2 * 1024 + 96, 64) * 0.3).bfloat16()
    targets = torch.randint(len(weight), (tokens,))

    def plain(hidden: Tensor) -> Tensor:
        logits = hidden @ weight.double().T
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return F.cross_entropy(logits, targets, reduction="none")

    forward, backward = errors(lambda hidden: linear_cross_entropy(hidden, weight, targets, softcap), plain, [hidden])
    assert forward <= PRODUCTS[torch.float32] and backward <= PRODUCTS[torch.float32]


@DTYPES
@pytest.mark.parametrize(
    ("window", "softcap", "groups", "size"),
    [
        (None, None, 1, 64),
        (16, None, 2, 64),
        (None, 5.0, 2, 64),
        (16, 5.0, 1, 64),
        (100, None, 4, 64),
        (None, None, 1, 512),  # Gemma 4's full attention
    ],
)
def test_attention(window: int | None, softcap: float | None, groups: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = pack(ROWS).layout
    parts = [torch.randn(layout.positions.shape[1], heads, size).to(dtype) for heads in (4, groups, groups)]
    scale = 1.6 / size**0.5
    real = [place for one in layout.segments for place in range(one.start, one.start + one.length)]

    (own, before), position = layout._segment_ids(), layout.positions[0]
    visible = (own[:, None] == own) | (before[:, None] == own)
    distance = position[:, None] - position
    visible &= (distance >= 0) & (distance < (window or len(position)))

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (part.repeat_interleave(4 // groups, 1) for part in (key, value))
        score = torch.einsum("qhd,khd->hqk", query, key)[:, real] * scale
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        probability = score.masked_fill(~visible[real], float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", probability, value)

    forward, backward = errors(
        lambda query, key, value: packed_attention(query, key, value, layout, scale, window, softcap)[real],
        plain,
        parts,
    )
    assert forward <= PRODUCTS[dtype] and backward <= PRODUCTS[dtype]


@DTYPES
def test_a_nan_does_not_disappear(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64).to(dtype)
    x[2, 5] = float("nan")
    assert _RMSNorm.apply(x, None, 1e-6).isnan()[2].all()
    assert _GatedGelu.apply(x, x.nan_to_num()).isnan()[2, 5]
    weight = torch.randn(96, 64).to(dtype)
    assert linear_cross_entropy(x, weight, torch.tensor([1, 2, 3, 4])).isnan().tolist() == [False, False, True, False]


def with_lora(family: str, dtype: torch.dtype) -> PeftModel:
    torch.manual_seed(1)
    if family in KINDS:
        gemma = even_gemma4(family, head_dim=32, global_head_dim=64).to(dtype)
    else:
        gemma = tiny_gemma(family, dtype, vocab_size=1000, hidden_size=64, intermediate_size=96, head_dim=32)
    model = get_peft_model(gemma, LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:  # zero at first: the adapter would not be at work
            torch.nn.init.normal_(parameter, std=0.1)
    fuse_layers(model)
    use_packed_attention(model.get_base_model())
    return model


def hidden_and_gradients(model: PeftModel) -> list[Tensor]:
    gemma, packed = model.get_base_model(), pack(ROWS)
    model.zero_grad()
    hidden = gemma.model(
        input_ids=packed.ids, position_ids=packed.layout.positions, layout=packed.layout, use_cache=False
    ).last_hidden_state[0]
    real = [place for one in packed.layout.segments for place in range(one.start, one.start + one.length)]
    (hidden[real].square() * torch.linspace(0, 1, hidden.shape[-1])).mean().backward()
    return [hidden[real].detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def gradient_error(found: list[Tensor], exact: list[Tensor]) -> float:
    return sum((one - other).double().square().sum().item() for one, other in zip(found[1:], exact[1:], strict=True))


def without_kernels(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "library", lambda dtype: None)
        return hidden_and_gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "e2b", "12b"])
def test_a_packed_step_in_bfloat16_is_as_near_to_float32_as_torch_is(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(family, torch.bfloat16)
    fast, plain = hidden_and_gradients(model), without_kernels(model, monkeypatch)
    exact = without_kernels(model.float(), monkeypatch)
    assert len(fast) == len(exact) == len(plain) > 1
    assert error(fast[0], exact[0]) < 1.2 * error(plain[0], exact[0])
    assert gradient_error(fast, exact) < 1.2 * gradient_error(plain, exact)


@pytest.mark.parametrize("family", [*FAMILIES, "e2b", "12b"])
def test_a_packed_step_in_float32_is_that_of_torch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(family, torch.float32)
    fast, plain = hidden_and_gradients(model), without_kernels(model, monkeypatch)
    assert len(fast) == len(plain) > 1
    for one, other in zip(fast, plain, strict=True):
        assert error(one, other) < 2e-5


@pytest.mark.slow
@DTYPES
def test_the_same_step_gives_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    model = with_lora("gemma3_text", dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = hidden_and_gradients(model), hidden_and_gradients(model)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_without_a_compiler_training_says_so_and_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(kernels, "library", cache(COMPILED.__wrapped__))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 32).to(dtype)
        assert kernels.kernels_for(x) is None
        assert "no C compiler is installed" in capsys.readouterr().out
        assert _RMSNorm.apply(x, None, 1e-6).shape == x.shape
