"""The faster layers compute what transformers and peft compute, for every Gemma family."""

import pytest
import torch
from conftest import FAMILIES, tiny_gemma
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from training.fused_layers import _norm_gradient, _RMSNorm, fuse_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(family: str, **options: object) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_gemma(family, vocab_size=1000), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: the adapter would not be at work
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def outputs_and_gradients(model: PeftModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden.square() * torch.linspace(0, 1, hidden.shape[-1])).mean().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_have_the_same_outputs_and_adapter_gradients(family: str) -> None:
    model = with_lora(family)
    ids = torch.randint(1000, (2, 40))  # longer than the sliding window
    plain, plain_gradients = outputs_and_gradients(model, ids)
    fuse_layers(model)
    changed = [module for module in model.modules() if "forward" in vars(module)]
    fast, fast_gradients = outputs_and_gradients(model, ids)

    norms_per_layer = {"gemma": 2, "gemma2": 4, "gemma3_text": 6}[family]
    assert len(changed) == 3 * (7 + 1 + 1 + norms_per_layer) + 1, "a layer was left slow"
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert fast_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_disabled_adapter_gives_the_outputs_of_the_base() -> None:
    model = with_lora("gemma3_text")
    ids = torch.randint(1000, (1, 12))
    with model.disable_adapter(), torch.inference_mode():
        plain = model(ids).logits
    fuse_layers(model)
    with model.disable_adapter(), torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_layers_that_cannot_be_fused_keep_the_forward_of_peft(options: dict[str, object]) -> None:
    model = with_lora("gemma3_text", **options)
    fuse_layers(model)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module) and name.endswith("_proj")]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_norm_gradient_for_a_gpu_equals_that_for_a_cpu(dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 7, 64, dtype=dtype, requires_grad=True), torch.randn(2, 7, 64, dtype=dtype)
    weight = torch.randn(64, dtype=dtype)
    _RMSNorm.apply(x, 1 + weight.float(), 1e-6).backward(grad)
    wide = x.detach().float()
    inverse = wide.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    found = _norm_gradient(grad, x.detach(), inverse, 1 + weight.float())
    assert found.dtype == dtype and x.grad is not None
    torch.testing.assert_close(found, x.grad, rtol=close, atol=close)
