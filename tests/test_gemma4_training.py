"""Training a Gemma 4 is what plain transformers and peft do row by row; what is not known keeps its own code."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gemma
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_gemma4 import KINDS, VOCABULARY, even_gemma4, tiny_gemma4
from torch import Tensor
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from core.errors import UserError
from training import kernels
from training.batches import Batches, loss_sum
from training.experts import round_experts
from training.fused_layers import fuse_layers
from training.packed_attention import use_packed_attention

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {  # heads of fewer than 32 features are computed without kernels, as on a machine without a compiler
    "torch": {"head_dim": 16, "global_head_dim": 32},
    "kernels": {"head_dim": 32, "global_head_dim": 64},
}
BEGINNING, OTHER = list(range(300, 330)), list(range(350, 374))
ROWS = [
    [2, *BEGINNING, *range(400, 407)],
    [2, *BEGINNING, *range(405, 445)],  # they share a prefix longer than the window of 16
    [2, *OTHER, 7, 8],
    [2, *OTHER, 9, 120, 121],
    [2, 5, 6],
    [2, *(n % 900 + 20 for n in range(100))],
]
TARGETS = [[20, 38], [33, 71], [1, 27], [26, 28], [1, 3], [60, 101]]


def lora4(kind: str, sizes: dict[str, int], targets: str | list[str] = "all-linear") -> PeftModel:
    """A Gemma 4 with an adapter that is at work."""
    return at_work(even_gemma4(kind, **sizes), targets)


def at_work(base: torch.nn.Module, targets: str | list[str] = "all-linear", **options: object) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model: PeftModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def row_by_row(model: PeftModel) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step over ROWS with nothing of this project."""
    count, total = sum(end - first for first, end in TARGETS), 0.0
    for row, (first, end) in zip(ROWS, TARGETS, strict=True):
        logits = model(input_ids=torch.tensor([row])).logits[0, first - 1 : end - 1]
        loss = F.cross_entropy(logits, torch.tensor(row[first:end]), reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def packed_step(model: PeftModel) -> tuple[float, dict[str, Tensor]]:
    """The same in micro-batches of packed rows; `model` is fused."""
    rows = {"input_ids": ROWS, "length": [len(row) for row in ROWS], "target_ranges": [[part] for part in TARGETS]}
    (step,) = Batches(Dataset.from_dict(rows), len(ROWS), 110, seed=None)
    assert len(step.micro_batches) > 1, "nothing is accumulated"
    assert any(segment.prefix_length for batch in step.micro_batches for segment in batch.layout.segments)
    total = 0.0
    for batch in step.micro_batches:
        loss = loss_sum(model.get_base_model(), batch) / step.target_tokens
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        largest = gradient.abs().max().item()
        assert largest > 0, f"{name}: no gradient to compare"
        assert (found[1][name] - gradient).abs().max().item() <= 1e-5 * largest, name


@pytest.mark.parametrize(
    "arithmetic", [pytest.param(one, marks=[pytest.mark.slow] * (one == "torch")) for one in SIZES]
)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_transformers_and_peft(
    kind: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed, with shared prefixes, rows beyond the window, several micro-batches; with and without checkpointing."""
    if arithmetic == "torch":
        monkeypatch.setattr(kernels, "library", lambda dtype: None)
    model = lora4(kind, SIZES[arithmetic])
    expected = row_by_row(model)
    fuse_layers(model)
    round_experts(model.get_base_model(), model.device)
    use_packed_attention(model.get_base_model())
    found = packed_step(model)
    assert_same(found, expected)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(packed_step(model), expected)


def test_adapters_on_experts_have_the_gradients_of_peft() -> None:
    base = even_gemma4("26b-a4b", **SIZES["kernels"])
    model = at_work(base, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    expected = row_by_row(model)
    assert sum("experts" in name for name in expected[1]) == 4 * len(base.model.layers)
    fuse_layers(model)
    round_experts(base, base.device)
    use_packed_attention(base)
    assert_same(packed_step(model), expected)


@pytest.mark.parametrize("kind", ["e2b", "e4b"])
def test_borrowed_keys_and_values_send_their_gradients_to_their_owner(kind: str) -> None:
    """With nothing but the owner's keys and values adapted, what borrowing layers add to its gradient is not small."""
    model = lora4(kind, SIZES["kernels"], targets=r".*layers\.(3|4)\.self_attn\.(k|v)_proj")
    expected = row_by_row(model)
    fuse_layers(model)
    use_packed_attention(model.get_base_model())
    assert_same(packed_step(model), expected)
    for layer in model.get_base_model().model.layers[5:]:
        layer.self_attn.register_forward_pre_hook(_cut_off, with_kwargs=True)
    alone = packed_step(model)[1]
    for name, gradient in expected[1].items():
        assert (alone[name] - gradient).norm() > 0.05 * gradient.norm(), f"{name}: nothing was borrowed"


def _cut_off(attention: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    shared = kwargs["shared_kv_states"]
    return args, {**kwargs, "shared_kv_states": {kind: tuple(p.detach() for p in shared[kind]) for kind in shared}}


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_experts_is_fused(kind: str) -> None:
    model = lora4(kind, SIZES["kernels"])
    fuse_layers(model)
    own = {"RMSNorm", "TextAttention", "TextMLP"}
    for name, module in model.get_base_model().named_modules():
        known = type(module).__name__.removeprefix("Gemma4").removeprefix("Unified") in own
        assert ("forward" in vars(module)) == (known or hasattr(module, "lora_A")), name


def tiny_gemma3n() -> Gemma3nForCausalLM:
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=64,
        hidden_size_per_layer_input=32,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] + ["sliding_attention"] * 2,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0, 0.0],
        laurel_rank=8,
        pad_token_id=0,
    )
    model = Gemma3nForCausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.15)
    return model


def test_a_family_of_other_arithmetic_keeps_its_own_code() -> None:
    """Gemma 3n has plain-weight norms and sparse MLPs under names of the same kind."""
    model = at_work(tiny_gemma3n())
    expected = row_by_row(model)
    fuse_layers(model)
    changed = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    assert changed == {"Linear"}, "more than peft's layers was replaced"
    found = row_by_row(model)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item(), msg=name)


def test_attention_to_later_tokens_is_refused() -> None:
    for base, everywhere in ((tiny_gemma4("31b"), "all"), (tiny_gemma("gemma3_text", vocab_size=600), True)):
        base.config.use_bidirectional_attention = everywhere
        with pytest.raises(UserError, match="attends to later tokens"):
            use_packed_attention(base)
    assert use_packed_attention(tiny_gemma4("31b")) == "sdpa"  # "vision": of images, of which there are none


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_bfloat16_is_as_near_to_float32_as_that_of_transformers(kind: str) -> None:
    model = lora4(kind, SIZES["kernels"])
    exact = row_by_row(model)[1]
    base = model.get_base_model()
    for parameter in base.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    plain = row_by_row(model)[1]
    fuse_layers(model)
    use_packed_attention(base)
    fast = packed_step(model)[1]

    def distance(found: dict[str, Tensor]) -> float:
        return sum((found[name] - exact[name]).norm().item() / exact[name].norm().item() for name in exact) / len(exact)

    assert distance(fast) < 1.2 * distance(plain)
