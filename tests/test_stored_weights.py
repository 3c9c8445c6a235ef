"""A base whose matrices stay in bfloat16 computes what the same base in float32 computes, in transformers and peft."""

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_gemma
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_gemma4 import KINDS, even_gemma4
from torch import Tensor
from transformers import PreTrainedModel

from core.load_model import load_base
from training.fused_layers import fuse_layers
from training.kernels import library
from training.stored_weights import can_store, load_stored

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(not library(torch.float32), reason="no C compiler is installed")


def saved(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    even = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 1024}
    gemma = even_gemma4(family, head_dim=32) if family in KINDS else tiny_gemma(family, **even)
    gemma.to(dtype).save_pretrained(folder)
    return folder


def adapted(base: PreTrainedModel, dropout: float = 0.0) -> PeftModel:
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return model


def loss_and_gradients(model: PeftModel) -> list[Tensor]:
    ids = torch.arange(3, 63).view(2, 30)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(part.grad for part in model.parameters() if part.grad is not None)]


@needs_kernels
@pytest.mark.parametrize("family", [*FAMILIES, "e2b", "26b-a4b"])
def test_it_computes_what_the_base_in_float32_computes(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path)
    assert can_store(folder, torch.float32, CPU)
    plain = adapted(load_base(folder, torch.float32, None, CPU))
    stored = adapted(load_stored(folder))
    fuse_layers(stored)
    in_bfloat16 = [name for name, part in stored.named_parameters() if part.dtype == torch.bfloat16]
    assert any("embed_tokens" in name for name in in_bfloat16) and any("down_proj" in name for name in in_bfloat16)
    found, exact = loss_and_gradients(stored), loss_and_gradients(plain)
    assert len(found) == len(exact) > 1
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * other.abs().max().item())


@needs_kernels
def test_layers_that_only_peft_computes_multiply_by_stored_matrices_too(tmp_path: Path) -> None:
    folder = saved("gemma3_text", tmp_path)
    plain, stored = (
        adapted(base, dropout=0.5).eval() for base in (load_base(folder, torch.float32, None, CPU), load_stored(folder))
    )
    for one, other in zip(loss_and_gradients(stored), loss_and_gradients(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * other.abs().max().item())


def test_only_what_is_published_in_bfloat16_is_stored_so(tmp_path: Path) -> None:
    assert not can_store(saved("gemma3_text", tmp_path, torch.float32), torch.float32, CPU)
    assert not can_store(saved("gemma3_text", tmp_path), torch.bfloat16, CPU)
    assert not can_store(tmp_path, torch.float32, torch.device("cuda"))
