"""core/layer_shapes.py against the modules that transformers builds."""

import pytest
import torch
from conftest import FAMILIES, tiny_gemma
from tiny_gemma4 import KINDS, tiny_folder4, tiny_gemma4, tiny_tokenizer4
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from core.layer_shapes import layer_shapes


def model_of(name: str) -> PreTrainedModel:
    return tiny_gemma4(name) if name in KINDS else tiny_gemma(name)


@pytest.mark.parametrize("name", [*FAMILIES, *KINDS])
def test_every_linear_layer_is_known_with_its_size(name: str) -> None:
    model = model_of(name)
    shapes = layer_shapes(model.config)
    assert len(shapes) == len(model.model.layers)
    for shape, layer in zip(shapes, model.model.layers, strict=True):
        built = {
            name: (part.in_features, part.out_features)
            for name, part in layer.named_modules()
            if isinstance(part, nn.Linear)
        }
        assert shape.linear() == built
        assert shape.kind == (getattr(layer.self_attn, "layer_type", None) or "full_attention")
        if shape.experts:
            assert layer.experts.gate_up_proj.shape == (shape.experts, 2 * shape.expert_inner, shape.hidden)


def test_borrowing_layers_name_the_last_of_their_kind_that_has_keys() -> None:
    sources = [shape.kv_source for shape in layer_shapes(tiny_gemma4("e2b").config)]
    assert sources == [0, 1, 2, 3, 4, 3, 3, 3, 3, 4]


def test_the_tiny_tokenizer_has_gemma_4s_control_tokens_at_their_ids(tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = tiny_folder4("e2b", tmp_path)
    ids = AutoTokenizer.from_pretrained(folder)("<|turn>user\nHi!<turn|>\n").input_ids
    assert ids[:2] == [2, 105] and ids[-2:] == [106, 107]
    assert tiny_tokenizer4().decode(ids[1:]) == "<|turn>user\nHi!<turn|>\n"
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits
    assert logits.isfinite().all()
