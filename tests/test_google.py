"""Google's own checkpoints are read as the models that they are.

The layout written out below is that of gemma_pytorch (commit 014acb7): its `GemmaForCausalLM` saved tiny Gemmas 1, 2
and 3 with the layers of 2B, 2B and 1B. Read here, they gave transformers the logits of its own forward pass to 5e-6.
"""

import json
import pickle
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, read_checked, tiny_gemma
from torch import Tensor

from converters import google
from core.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = {"gemma": 18, "gemma2": 26, "gemma3_text": 26}


def tiny(family: str) -> Any:
    """Of as many layers as one that Google published, whose heads have 256 values."""
    sizes = {"num_hidden_layers": LAYERS[family], "layer_types": None, "head_dim": 256, "hidden_size": 16}
    return tiny_gemma(family, torch.bfloat16, vocab_size=64, intermediate_size=16, **sizes)


def state(model: Any) -> dict[str, Tensor]:
    """The state dict of gemma_pytorch's model."""
    found = {}
    for name, weight in model.state_dict().items():
        if name.endswith("q_proj.weight"):
            parts = [model.state_dict()[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif name == "model.embed_tokens.weight":
            found["embedder.weight"] = weight
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "lm_head.weight")):
            found[name.replace("q_norm", "query_norm").replace("k_norm", "key_norm")] = weight
    return {**found, "local_freqs_cis": torch.polar(torch.ones(4, 8), torch.ones(4, 8))}


read = partial(read_checked, google)


def same(found: Any, model: Any) -> None:
    expected = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    assert set(found.tensors) == set(expected)
    assert all(torch.equal(found.tensors[name].read(), weight) for name, weight in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_the_model_that_google_published(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    torch.save({"model_state_dict": state(model)}, tmp_path / "gemma.ckpt")
    assert google.recognizes(tmp_path / "gemma.ckpt") and not google.recognizes(tmp_path)
    found = read(tmp_path / "gemma.ckpt")
    same(found, model)
    wanted = {"gemma": None, "gemma2": 4096, "gemma3_text": 512}[family]
    assert found.config["model_type"] == family and found.config.get("sliding_window") == wanted


def test_shards_with_an_index_are_read(tmp_path: Path) -> None:
    model = tiny("gemma2")
    tensors = state(model)
    first = {name: tensor for name, tensor in tensors.items() if "layers.1" in name}
    parts = {"model-00001.bin": first, "model-00002.bin": {n: t for n, t in tensors.items() if n not in first}}
    for name, part in parts.items():
        torch.save(part, tmp_path / name)
    weight_map = {tensor: name for name, part in parts.items() for tensor in part}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert google.recognizes(tmp_path)
    same(read(tmp_path), model)
    index.write_text(json.dumps({"weight_map": {"model.layers.0.self_attn.qkv_proj.weight": "/etc/passwd"}}))
    with pytest.raises(UserError, match="own folder"):
        read(tmp_path)


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("this must never run",)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gemma.ckpt"
    torch.save({"model_state_dict": state(tiny("gemma")), "self_attn.qkv_proj": Hostile()}, path)
    assert google.recognizes(path)
    with pytest.raises(UserError, match="refused: it holds more than tensors, and would run code"):
        read(path)
    path.write_bytes(pickle.dumps(Hostile()))
    assert not google.recognizes(path)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["quantized", "heads", "missing", "layers", "nan"])
def test_what_is_no_whole_gemma_is_refused(change: str, tmp_path: Path) -> None:
    tensors, name = state(tiny("gemma")), "model.layers.1.self_attn.qkv_proj.weight"
    if change == "quantized":
        tensors["embedder.weight_scaler"] = torch.ones(64)
    elif change == "heads":
        tensors[name] = tensors[name][:-1].clone()
    elif change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif change == "layers":
        tensors = {key: tensor for key, tensor in tensors.items() if "layers.7." not in key}
    else:
        tensors[name][5, 5] = torch.nan
    torch.save({"model_state_dict": tensors}, tmp_path / "gemma.ckpt")
    named = {
        "quantized": "quantized",
        "heads": "heads of 256",
        "missing": "up_proj",
        "layers": "17 layers",
        "nan": "not finite",
    }[change]
    with pytest.raises(UserError, match=named):
        for tensor in read(tmp_path / "gemma.ckpt").tensors.values():
            tensor.read()


@pytest.mark.parametrize("trials", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_files_end_in_one_sentence(trials: int, tmp_path: Path) -> None:
    path, chance = tmp_path / "gemma.ckpt", random.Random(2)
    torch.save({"model_state_dict": state(tiny("gemma"))}, path)
    whole = path.read_bytes()
    for trial in range(trials):
        damaged = bytearray(whole)
        if trial % 2:
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(whole)) :]
        path.write_bytes(damaged)
        google.recognizes(path)
        try:
            for tensor in read(path).tensors.values():
                tensor.read()
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert trial % 2  # padding between records
