"""Packing changes what is computed once and what lies where, never the result."""

from functools import partial

import pytest
import torch
from conftest import FAMILIES, tiny_gemma
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from training import packed_attention, packing
from training.fused_layers import fuse_layers
from training.packed_attention import _attention_interface, _flex_attention, use_packed_attention
from training.packing import ROUND, Layout, pack, shared_prefixes

BEGINNING = list(range(10, 40))
OTHER = list(range(50, 74))
ROWS = sorted(
    [
        [2, *BEGINNING, *range(100, 107)],
        [2, *BEGINNING, *range(105, 145)],
        [2, *BEGINNING],  # nothing but the beginning
        [2, *OTHER, 7, 8],
        [2, *OTHER, 9],
        [2, 5, 6],
        [2, *(n % 900 + 20 for n in range(300))],  # longer than a block of queries
    ]
)


def with_lora(family: str) -> PeftModel:
    model = get_peft_model(tiny_gemma(family, vocab_size=1000), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: the adapter would not be at work
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def hidden_of_rows(gemma: PreTrainedModel, rows: list[list[int]]) -> list[Tensor]:
    packed = pack(rows)
    layout = packed.layout.to(gemma.device)
    hidden = gemma.model(
        input_ids=packed.ids.to(gemma.device), position_ids=layout.positions, layout=layout, use_cache=False
    ).last_hidden_state[0]
    return [hidden[[*prefix, *rest]] for prefix, rest in zip(packed.prefixes, packed.rests, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_have_the_hidden_states_and_gradients_of_single_samples(family: str) -> None:
    model = with_lora(family)
    gemma = model.get_base_model()
    weight = torch.linspace(-1, 1, gemma.config.hidden_size)
    alone = [gemma.model(torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in ROWS]
    sum((hidden * weight).square().sum() for hidden in alone).backward()
    expected = gradients(model)

    model.zero_grad()
    fuse_layers(model)
    use_packed_attention(gemma)
    packed = hidden_of_rows(gemma, ROWS)
    sum((hidden * weight).square().sum() for hidden in packed).backward()
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_flex_attention_on_a_gpu_masks_as_the_blocks_on_a_cpu_do(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    layout = pack(ROWS).layout
    tokens = layout.positions.shape[1]
    query, key, value = torch.randn(1, 4, tokens, 16), *torch.randn(2, 1, 2, tokens, 16)
    options = {"scaling": 0.25, "layout": layout, "sliding_window": window, "softcap": softcap}
    blocks, _ = _attention_interface(None, query, key, value, None, **options)  # type: ignore[arg-type]
    flex = _flex_attention(query, key, value, layout, 0.25, window, softcap)
    real = [n for segment in layout.segments for n in range(segment.start, segment.start + segment.length)]
    torch.testing.assert_close(blocks[0, real], flex[0, real], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_flex_attention_is_compiled_once_for_packs_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's tracer alone: what it does not trace anew, a GPU does not compile anew."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = packing.compiled.__wrapped__
    for module, function in ((packed_attention, "flex_attention"), (packing, "create_block_mask")):
        monkeypatch.setattr(module, function, compiled(getattr(module, function)))
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for longest in (90, 20, 33, 120, 50):
        rows = [
            [2, *BEGINNING, *range(100, 103 + int(torch.randint(longest, (), generator=generator)))] for _ in range(12)
        ]
        layout = pack(sorted(rows)).layout
        for window in (None, 16):
            tokens = layout.positions.shape[1]
            query, key, value = torch.randn(1, 4, tokens, 16), *torch.randn(2, 1, 2, tokens, 16)
            options = {"scaling": 0.25, "layout": layout, "sliding_window": window, "softcap": 50.0}
            blocks, _ = _attention_interface(None, query, key, value, None, **options)  # type: ignore[arg-type]
            flex = _flex_attention(query, key, value, layout, 0.25, window, 50.0)
            real = [n for segment in layout.segments for n in range(segment.start, segment.start + segment.length)]
            torch.testing.assert_close(blocks[0, real], flex[0, real], rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[-1], "compiled again for a length or a window"


def test_bfloat16_stays_close_to_float32() -> None:
    torch.manual_seed(0)
    layout = pack(ROWS).layout
    parts = [torch.randn(1, heads, layout.positions.shape[1], 32, requires_grad=True) for heads in (4, 1, 1)]
    real = [n for segment in layout.segments for n in range(segment.start, segment.start + segment.length)]

    def result(dtype: torch.dtype) -> list[Tensor]:
        query, key, value = (part.to(dtype) for part in parts)
        out, _ = _attention_interface(None, query, key, value, None, scaling=0.2, layout=layout)  # type: ignore[arg-type]
        out = out[:, real]
        return [out.float(), *torch.autograd.grad(out.float().square().sum(), parts)]

    for exact, rounded in zip(result(torch.float32), result(torch.bfloat16), strict=True):
        assert (exact - rounded).abs().max() < 0.03 * exact.abs().max()


def test_a_shared_prefix_is_packed_once() -> None:
    packed = pack(ROWS)
    unique = packed.layout.segments
    assert sum(segment.length for segment in unique) == sum(map(len, ROWS)) - 2 * 31 - 1 * 25
    assert packed.ids.shape[1] % ROUND == 0 and packed.ids.shape == packed.layout.positions.shape
    for row, prefix, rest in zip(ROWS, packed.prefixes, packed.rests, strict=True):
        assert packed.ids[0, [*prefix, *rest]].tolist() == row
        assert packed.layout.positions[0, [*prefix, *rest]].tolist() == list(range(len(row)))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([[1] * 50], [(0, range(1))]),
        ([[1] * 50, [1] * 50], [(50, range(2))]),
        ([[1] * 15, [1] * 15], [(0, range(0, 1)), (0, range(1, 2))]),
        # The third row would shorten what the first two share by more than it saves.
        ([[1] * 60, [1] * 60 + [2], [1] * 20 + [3]], [(60, range(2)), (0, range(2, 3))]),
    ],
)
def test_samples_share_a_prefix_where_that_saves_tokens(
    rows: list[list[int]], expected: list[tuple[int, range]]
) -> None:
    assert list(shared_prefixes(rows)) == expected


def test_an_empty_pack_is_only_padding() -> None:
    packed = pack([])
    assert packed.ids.shape == (1, ROUND) and packed.layout == Layout(packed.layout.positions, [])
