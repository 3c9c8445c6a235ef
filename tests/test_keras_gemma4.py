"""KerasHub's preset of a Gemma 4 holds what the model is, of every size, and gives it back.

Where keras-hub is installed, KerasHub itself loads and saves the presets (`run_keras_hub.py`).
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, read_checked
from test_keras import datasets
from tiny_gemma4 import KINDS, tiny_folder4, tiny_gemma4, tiny_tokenizer4
from torch import Tensor

from benchmarks.worker import NotRun, find_python
from converters import hf, keras
from converters.checkpoint import Adapter, Checkpoint
from core.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = [2, *range(300, 340)]  # a row longer than the window of 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of every kind and dtype, each made when it is first asked for."""

    class Folders(dict[tuple[str, torch.dtype], Path]):
        def __missing__(self, key: tuple[str, torch.dtype]) -> Path:
            self[key] = tiny_folder4(key[0], tmp_path_factory.mktemp(key[0]), key[1])
            return self[key]

    return Folders()


read = partial(read_checked, keras)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", [kind if kind == "31b" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_preset_survives_a_round_trip(kind: str, dtype: torch.dtype, folders: Any, tmp_path: Path) -> None:
    expected = hf.read(folders[kind, dtype])
    keras.write(expected, tmp_path / "keras")
    assert keras.recognizes(tmp_path / "keras")
    found = read(tmp_path / "keras")
    assert isinstance(found, Checkpoint) and set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name].read(), tensor.read()), name
    config = expected.config | {"max_position_embeddings": 131_072 if kind in ("e2b", "e4b") else 262_144}
    if kind == "12b":  # of which KerasHub's is the same text model
        config |= {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"]}
    config = {name: value for name, value in config.items() if "global" not in name}
    assert {name: found.config.get(name) for name in config} == config
    assert found.files["tokenizer.json"].read_bytes() == (folders[kind, dtype] / "tokenizer.json").read_bytes()


def test_the_layout_is_that_of_kerashub(folders: Any, tmp_path: Path) -> None:
    keras.write(hf.read(folders["26b-a4b", torch.float32]), tmp_path / "experts")
    keras.write(hf.read(folders["e2b", torch.float32]), tmp_path / "small")
    of_experts, of_small = tiny_gemma4("26b-a4b").model, tiny_gemma4("e2b").model
    layer, block = of_experts.layers[5], "layers/gemma4_text_decoder_block_5"  # full attention, values are keys
    expected: dict[str, Tensor] = {
        f"{block}/vars/0": layer.layer_scalar[0],
        f"{block}/attention/query_dense/vars/0": layer.self_attn.q_proj.weight.view(4, 32, 64).transpose(1, 2),
        f"{block}/attention/key_dense/vars/0": layer.self_attn.k_proj.weight.view(1, 32, 64).transpose(1, 2),
        f"{block}/attention/output_dense/vars/0": layer.self_attn.o_proj.weight.T.view(4, 32, 64),
        f"{block}/moe_expert_bank/vars/0": layer.experts.gate_up_proj[:, :24].transpose(1, 2),
        f"{block}/moe_expert_bank/vars/1": layer.experts.gate_up_proj[:, 24:].transpose(1, 2),
        f"{block}/moe_expert_bank/vars/2": layer.experts.down_proj.transpose(1, 2),
        f"{block}/moe_expert_bank/vars/3": layer.router.per_expert_scale,
        f"{block}/moe_router/vars/0": layer.router.scale,
        f"{block}/moe_router/proj/vars/0": layer.router.proj.weight.T,
        f"{block}/pre_ffw_norm_moe/vars/0": layer.pre_feedforward_layernorm_2.weight,
        f"{block}/post_ffw_norm_dense/vars/0": layer.post_feedforward_layernorm_1.weight,
        f"{block}/post_ffw_norm_moe_path/vars/0": layer.post_feedforward_layernorm_2.weight,
        "layers/rms_normalization/vars/0": of_experts.norm.weight,
    }
    with h5py.File(tmp_path / "experts/model.weights.h5") as file:
        assert f"{block}/attention/value_dense" not in file
        for place, weight in expected.items():
            np.testing.assert_array_equal(file[place][()], weight.detach().numpy(), err_msg=place)
    expected = {
        "layers/embedding/vars/0": of_small.embed_tokens_per_layer.weight,
        "layers/dense/vars/0": of_small.per_layer_model_projection.weight.T,
        "layers/rms_normalization/vars/0": of_small.per_layer_projection_norm.weight,
        "layers/rms_normalization_1/vars/0": of_small.norm.weight,
        "layers/gemma4_text_decoder_block/per_layer_up_proj/vars/0": of_small.layers[0].per_layer_projection.weight.T,
        "layers/gemma4_text_decoder_block_9/gating_ffw/vars/0": of_small.layers[9].mlp.gate_proj.weight.T,
    }
    with h5py.File(tmp_path / "small/model.weights.h5") as file:
        assert "layers/gemma4_text_decoder_block_9/attention/key_dense" not in file
        for place, weight in expected.items():
            np.testing.assert_array_equal(file[place][()], weight.detach().numpy(), err_msg=place)
    settings = json.loads((tmp_path / "experts/config.json").read_text())
    assert settings["registered_name"] == "keras_hub>Gemma4Backbone"
    assert settings["config"]["num_global_key_value_heads"] == 1 and settings["config"]["global_head_dim"] == 32


def test_the_tokenizer_is_sentencepiece_with_gemma_4s_tokens(folders: Any, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    keras.write(hf.read(folders["31b", torch.float32]), tmp_path / "keras")
    tokenizer = json.loads((tmp_path / "keras/tokenizer.json").read_text())
    assert tokenizer["module"] == "keras_hub.src.models.gemma4.gemma4_tokenizer"
    assert tokenizer["config"]["has_vision_tokens"] is tokenizer["config"]["has_audio_tokens"] is False
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "keras/assets/tokenizer/vocabulary.spm"))
    for text in ("We heard nothing.", "<|turn>user\nhi<turn|>\n<|channel>thought\n<channel|>"):
        assert [2, *pieces.encode(text)] == tiny_tokenizer4()(text).input_ids


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_activation": "relu"}, "activation"),
        ({"use_bidirectional_attention": "all"}, "later tokens"),
        ({"layer_types": ["full_attention"] * 6}, "one kind"),
        ({"attention_k_eq_v": False}, "other heads of keys"),
    ],
)
def test_a_model_that_kerashub_cannot_express_is_refused(
    change: dict[str, Any], named: str, folders: Any, tmp_path: Path
) -> None:
    found = hf.read(folders["31b", torch.float32])
    found.config = {**found.config, **change}
    with pytest.raises(UserError, match=named):
        keras.write(found, tmp_path / "keras")
    assert not (tmp_path / "keras").exists()


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("num_global_key_value_heads", None, "shape|v_proj"),
        ("num_kv_shared_layers", 2, "configuration"),
        ("use_sliding_window_attention", False, "sliding windows"),
        ("global_rope_scaling_factor", 8.0, "RoPE"),
        ("layer_types", ["full_attention"], "does not describe"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(
    name: str, value: Any, named: str, folders: Any, tmp_path: Path
) -> None:
    keras.write(hf.read(folders["31b", torch.float32]), tmp_path / "keras")
    settings = json.loads((tmp_path / "keras/config.json").read_text())
    settings["config"][name] = value
    (tmp_path / "keras/config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=named):
        read(tmp_path / "keras")


def test_what_kerashub_has_no_form_for_is_refused(folders: Any, tmp_path: Path) -> None:
    source = hf.read(folders["31b", torch.float32])
    with pytest.raises(UserError, match="to=merged"):
        keras.write(Adapter({"r": 1, "lora_alpha": 1}, {}, config=source.config), tmp_path / "a.lora.h5")
    keras.write(source, tmp_path / "keras")
    with pytest.raises(UserError, match=r"config\.json of the KerasHub preset"):
        read(tmp_path / "keras/model.weights.h5")
    with h5py.File(tmp_path / "keras/model.weights.h5", "a") as file:
        file["layers/gemma4_text_decoder_block/vars/0"][()] = np.nan
    with pytest.raises(UserError, match=r"not finite|not a number"):
        read(tmp_path / "keras").tensors["model.layers.0.layer_scalar"].read()


def test_two_halves_of_the_experts_that_do_not_fit_are_refused(folders: Any, tmp_path: Path) -> None:
    keras.write(hf.read(folders["26b-a4b", torch.float32]), tmp_path / "keras")
    with h5py.File(tmp_path / "keras/model.weights.h5", "a") as file:
        del file["layers/gemma4_text_decoder_block_2/moe_expert_bank/vars/1"]
        file["layers/gemma4_text_decoder_block_2/moe_expert_bank/vars/1"] = np.zeros((3, 64, 24), np.float32)
    with pytest.raises(UserError, match=r"moe_expert_bank/vars/0 and .* do not fit each other"):
        read(tmp_path / "keras")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kerashub_itself_computes_what_transformers_does(kind: str, folders: Any, tmp_path: Path) -> None:
    interpreters = [os.environ.get("KERAS_HUB_PYTHON", ""), ROOT / ".venv-keras-hub/bin/python", sys.executable]
    try:
        python = find_python("keras_hub", map(str, interpreters), ".venv-keras-hub")
    except NotRun as missing:
        pytest.skip(str(missing))
    keras.write(hf.read(folders[kind, torch.float32]), tmp_path / "ours")
    job = json.dumps({"preset": str(tmp_path / "ours"), "ids": IDS, "save": str(tmp_path / "theirs")})
    command = [python, Path(__file__).with_name("run_keras_hub.py")]
    done = subprocess.run(command, input=job + "\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.inference_mode():
        expected = tiny_gemma4(kind).model(torch.tensor([IDS]), use_cache=False).last_hidden_state[0]
    hidden = torch.from_numpy(np.load(tmp_path / "theirs/hidden.npy"))
    torch.testing.assert_close(hidden, expected, atol=5e-4, rtol=0)
    assert datasets(tmp_path / "theirs/model.weights.h5") == datasets(tmp_path / "ours/model.weights.h5")
    found = read(tmp_path / "theirs")
    assert isinstance(found, Checkpoint)
    for name, tensor in hf.read(folders[kind, torch.float32]).tensors.items():
        assert torch.equal(found.tensors[name].read(), tensor.read()), name
