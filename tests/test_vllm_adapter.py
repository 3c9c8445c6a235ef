"""An adapter of a Gemma 4 for vLLM computes there what it does in peft.

vLLM cannot run in this suite (docs/serving.md has what came of it): the tensors are held to peft's own merge.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_gemma4 import KINDS, tiny_gemma4

from core.artifacts import ServedAdapter
from serving.repository import put_adapter, write_vllm_repository

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CHOICES = [EXPERTS, EXPERTS[:1], EXPERTS[1:]]
SERVING = ServedAdapter(name="slang", task="slang")


def adapted(kind: str, folder: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A random adapter in `folder`, the update that peft merges into each matrix, and the base's config.json."""
    model = get_peft_model(tiny_gemma4(kind), LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, **settings))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    (folder / "prompt.json").write_text("{}")
    model.get_base_model().config.save_pretrained(folder / "base")
    before = tiny_gemma4(kind).state_dict()
    after = model.merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before}, json.loads((folder / "base/config.json").read_text())


def update(tensors: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    a, b = (tensors[f"base_model.model.{layer}.lora_{factor}.weight"] for factor in "AB")
    return 2.0 * b @ a


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "parameters"), [*((k, None) for k in KINDS), *(("26b-a4b", p) for p in CHOICES)])
def test_every_matrix_that_vllm_has_gets_pefts_update(kind: str, parameters: list[str] | None, tmp_path: Path) -> None:
    experts = {"target_parameters": parameters} if parameters else {}
    merged, config = adapted(kind, tmp_path / "peft", target_modules=SEVEN, **experts)
    assert put_adapter(tmp_path, tmp_path / "peft", SERVING, config)
    assert not put_adapter(tmp_path, tmp_path / "peft", SERVING, config)  # the same again
    tensors = load_file(tmp_path / "adapters/slang/adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}
    used = set()
    for name, wanted in merged.items():
        layer = name.removesuffix(".weight")
        if parameters and name.endswith("experts.gate_up_proj"):
            where = layer.removesuffix(".gate_up_proj")
            for number, one in enumerate(wanted):
                both = [f"{where}.{number}.{which}" for which in ("gate_proj", "up_proj")]
                torch.testing.assert_close(torch.cat([update(tensors, each) for each in both]), one, atol=1e-6, rtol=0)
                used |= {*both}
        elif parameters and name.endswith("experts.down_proj"):
            for number, one in enumerate(wanted):
                each = f"{layer.removesuffix('.down_proj')}.{number}.down_proj"
                torch.testing.assert_close(update(tensors, each), one, atol=1e-6, rtol=0)
                used.add(each)
        elif layer in layers:
            torch.testing.assert_close(update(tensors, layer), wanted, atol=1e-6, rtol=0)
            used.add(layer)
        else:
            assert not wanted.any(), f"{name} was adapted, and vLLM is not told"
    # What is left is the value matrices that only vLLM has: where values are keys, they move together.
    values = layers - used
    full = [n for n, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert parameters is None or len([layer for layer in layers if ".experts." in layer]) == 6 * 4 * 3
    values = {layer for layer in values if ".experts." not in layer or update(tensors, layer).any()}
    assert values == {f"model.layers.{n}.self_attn.v_proj" for n in full if config["attention_k_eq_v"]}
    for layer in values:
        assert torch.equal(update(tensors, layer), update(tensors, layer.replace("v_proj", "k_proj")))
    written = json.loads((tmp_path / "adapters/slang/adapter_config.json").read_text())
    assert written["target_parameters"] is None and written["r"] == 3


@pytest.mark.parametrize("kind", ["12b", "31b"])
def test_vllm_gets_a_class_that_it_has(kind: str, tmp_path: Path) -> None:
    tiny_gemma4(kind).save_pretrained(tmp_path / "tiny")
    (tmp_path / "serve/adapters").mkdir(parents=True)
    write_vllm_repository(tmp_path / "serve", tmp_path / "tiny")
    model = json.loads((tmp_path / "serve/repository/gemma/1/model.json").read_text())
    known = {"architectures": ["Gemma4ForCausalLM"]}
    assert model.get("hf_overrides") == (known if kind == "12b" else None)


def test_the_embedded_engines_adapter_and_other_families_stay_as_they_are(tmp_path: Path) -> None:
    adapted("31b", tmp_path / "peft", target_modules=SEVEN)
    shutil.copytree(tmp_path / "peft", tmp_path / "other")
    put_adapter(tmp_path, tmp_path / "peft", SERVING)
    put_adapter(tmp_path, tmp_path / "other", ServedAdapter(name="other"), {"model_type": "gemma3_text"})
    for name in ("slang", "other"):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "adapters" / name / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()
