"""KerasHub's files hold what a model is, as KerasHub lays it out, and give it back.

The layout written out below (`keras_file`, `keras_lora`) is KerasHub's: keras-hub 0.32.0 on Keras 3.15.1 (torch) saved
tiny Gemmas 1, 2 and 3 in float32 and bfloat16 as presets, whole and in shards, with the LoRA of query and value and of
all seven layers. Read here, they gave transformers and peft the logits of KerasHub's own forward pass to 5e-6 of 4
(0.06 in bfloat16), and written again the same bytes in every dataset. What is written here, KerasHub loaded
(`from_preset`, `load_lora_weights`), with the logits of transformers.
"""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import FAMILIES, read_checked, tiny_gemma
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tiny_tokenizer import TEXTS, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters import hf, keras
from converters.checkpoint import Adapter, Checkpoint, in_memory
from converters.convert import convert
from core.errors import UserError
from core.prompt import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = Prompt("Instruction:\n{instruction}\n\nResponse:\n{response}", "{ask}", "{slang}", {"ask": "«Was?»"})
HEADS, PAIRS, SIZE = 4, 2, 16
NAMES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
DENSE = {"gate_proj": "gating_ffw", "up_proj": "gating_ffw_2", "down_proj": "ffw_linear"}
NORMS = {
    "input_layernorm": "pre_attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "q_norm": "attention/query_norm",
    "k_norm": "attention/key_norm",
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """As KerasHub has it: every sixth layer of a Gemma 3 sees everything."""
    if family == "gemma3_text":
        options = {"layer_types": None, "num_hidden_layers": 7, **options}
    return tiny_gemma(family, dtype, vocab_size=len(tiny_tokenizer()), **options)


def keras_array(name: str, weight: Tensor) -> np.ndarray:
    """KerasHub's array of transformers' [out, in], head by head."""
    values = weight.view(torch.int16).numpy().view("V2") if weight.dtype == torch.bfloat16 else weight.numpy()
    if name in ("q_proj", "k_proj", "v_proj"):  # [heads, in, size]
        return np.stack([values[at : at + SIZE].T for at in range(0, len(values), SIZE)])
    if name == "o_proj":  # [heads, size, out]
        return np.stack([values[:, at : at + SIZE].T for at in range(0, values.shape[1], SIZE)])
    return values.T if name in DENSE else values


def keras_file(model: Any, path: Path, root: str = "", kept: Callable[[str], bool] = lambda name: True) -> None:
    """`backbone.save_weights`, written out."""
    family = model.config.model_type
    block = "gemma3_decoder_block" if family == "gemma3_text" else "gemma_decoder_block"
    with h5py.File(path, "w") as file:
        for name, weight in model.model.state_dict().items():
            parts = name.split(".")
            if parts[0] == "layers":
                last = parts[-2]
                place = NORMS.get(last) or DENSE.get(last) or f"attention/{NAMES[last]}_dense"
                if family == "gemma" and last == "post_attention_layernorm":
                    place = "pre_ffw_norm"
                place = f"{block}{'_' + parts[1] if parts[1] != '0' else ''}/{place}"
            else:
                last, place = "", {"embed_tokens": "reversible_embedding", "norm": "rms_normalization"}[parts[0]]
            if kept(place):
                file[f"{root}layers/{place}/vars/0"] = keras_array(last, weight)
                if weight.dtype == torch.bfloat16:
                    file[f"{root}layers/{place}/vars/0"].attrs["dtype"] = "bfloat16"


def keras_config(model: Any) -> dict[str, Any]:
    """`config.json` of a preset, as KerasHub serializes its backbone."""
    config, of_3 = model.config, model.config.model_type == "gemma3_text"
    settings = {
        "name": "gemma_backbone",
        "trainable": True,
        "dtype": {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}},
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_query_heads": HEADS,
        "num_key_value_heads": PAIRS,
        "hidden_dim": config.hidden_size,
        "head_dim": SIZE,
        "layer_norm_epsilon": 1e-6,
        "intermediate_dim": config.intermediate_size * (1 if of_3 else 2),
        "dropout": 0,
    }
    after = config.model_type != "gemma"
    settings |= {
        "query_head_dim_normalize": True,
        "use_post_ffw_norm": after,
        "use_post_attention_norm": after,
        "attention_logit_soft_cap": 50.0 if config.model_type == "gemma2" else None,
        "final_logit_soft_cap": 30.0 if config.model_type == "gemma2" else None,
        "use_sliding_window_attention": after,
        "sliding_window_size": 16 if after else 4096,
    }
    if of_3:
        settings |= {
            "image_size": None,
            "vision_encoder": None,
            "use_query_key_norm": True,
            "local_rope_scaling_factor": 1.0,
            "global_rope_scaling_factor": 1.0,
            "use_bidirectional_attention": False,
            "is_embedding_model": False,
        }
    name = "Gemma3Backbone" if of_3 else "GemmaBackbone"
    return {
        "module": "keras_hub.src.models.gemma.gemma_backbone",
        "class_name": name,
        "config": settings,
        "registered_name": f"keras_hub>{name}",
    }


def preset(model: Any, folder: Path) -> Path:
    folder.mkdir()
    keras_file(model, folder / "model.weights.h5")
    (folder / "config.json").write_text(json.dumps(keras_config(model)))
    return folder


read = partial(read_checked, keras)


def same(found: Checkpoint, model: Any) -> None:
    expected = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    assert set(found.tensors) == set(expected)
    for name, weight in expected.items():
        assert found.tensors[name].dtype == weight.dtype and torch.equal(found.tensors[name].read(), weight), name


def datasets(path: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: (item.shape, item.dtype.str, item[()].tobytes())})
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_survives_a_round_trip(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(family, dtype)
    theirs = preset(model, tmp_path / "theirs")
    assert keras.recognizes(theirs)
    found = read(theirs)
    same(found, model)
    config, written = type(model.config)(**found.config), keras_config(model)["config"]
    settings = ["query_pre_attn_scalar", "layer_types", "sliding_window", "attn_logit_softcapping"]
    for name in ["rope_parameters", *(settings if family != "gemma" else [])]:
        assert getattr(config, name) == getattr(model.config, name)
    found.prompt = PROMPT
    keras.write(found, tmp_path / "ours")
    assert datasets(tmp_path / "ours/model.weights.h5") == datasets(theirs / "model.weights.h5")
    ours = json.loads((tmp_path / "ours/config.json").read_text())
    assert ours["class_name"] == keras_config(model)["class_name"]
    assert all(written[key] == value for key, value in ours["config"].items() if key != "dtype")
    assert read(tmp_path / "ours").prompt == PROMPT


def test_shards_and_the_file_of_a_task_are_read(tmp_path: Path) -> None:
    model = tiny("gemma2")
    folder = preset(model, tmp_path / "sharded")
    (folder / "model.weights.h5").unlink()
    parts = {
        "model_00000.weights.h5": lambda place: "decoder_block_1" in place,
        "model_00001.weights.h5": lambda place: "decoder_block_1" not in place,
    }
    for name, kept in parts.items():
        keras_file(model, folder / name, kept=kept)
    weight_map = {f"/layers/{number}": name for number, name in enumerate(parts)}
    (folder / "model.weights.json").write_text(json.dumps({"weight_map": weight_map}))
    same(read(folder), model)
    (folder / "model.weights.json").write_text(json.dumps({"weight_map": {"/layers/0": "../elsewhere.h5"}}))
    with pytest.raises(UserError, match="own folder"):
        read(folder)
    task = preset(model, tmp_path / "task")
    keras_file(model, task / "model.weights.h5", root="layers/gemma_backbone/")
    same(read(task), model)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("gemma", 18), ("gemma2", 26), ("gemma3_text", 26), pytest.param("gemma3_text", 34, marks=pytest.mark.slow)],
)
def test_a_weights_file_alone_gets_the_published_configuration(family: str, layers: int, tmp_path: Path) -> None:
    model = tiny(family, num_hidden_layers=layers, layer_types=None)
    keras_file(model, tmp_path / "gemma.weights.h5")
    found = read(tmp_path / "gemma.weights.h5")
    same(found, model)
    config = found.config
    if family == "gemma2":
        assert config["sliding_window"] == 4096 and config["attn_logit_softcapping"] == 50
    if family == "gemma3_text":
        whole = config["rope_parameters"]["full_attention"]
        assert (config["sliding_window"], whole.get("factor")) == ((512, None) if layers == 26 else (1024, 8.0))
    keras_file(tiny(family), tmp_path / "own.weights.h5")
    with pytest.raises(UserError, match=r"config\.json"):
        read(tmp_path / "own.weights.h5")


def test_the_tokenizer_is_converted_from_and_to_sentencepiece(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    tiny("gemma2").save_pretrained(tmp_path / "hf")
    tiny_tokenizer().save_pretrained(tmp_path / "hf")
    keras.write(hf.read(tmp_path / "hf"), tmp_path / "keras")
    assert json.loads((tmp_path / "keras/tokenizer.json").read_text())["class_name"] == "GemmaTokenizer"
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "keras/assets/tokenizer/vocabulary.spm"))
    for text in TEXTS:
        assert [2, *pieces.encode(text)] == tiny_tokenizer()(text).input_ids
    files = read(tmp_path / "keras").files
    assert files["tokenizer.json"].read_bytes() == (tmp_path / "hf/tokenizer.json").read_bytes()
    shutil.rmtree(tmp_path / "keras/transformers")  # as in a preset of KerasHub's own
    hf.write(read(tmp_path / "keras"), tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        assert again(text).input_ids == tiny_tokenizer()(text).input_ids


# Places in Keras' walk over the layers that have weights: of layer 0, and from one layer to the next.
FEED_FORWARD = {"ffw_linear": 2, "ffw_gating_2": 3, "ffw_gating": 4}
WALK = {
    "gemma": (11, {**FEED_FORWARD, "output": 7, "value": 8, "key": 9, "query": 10}),
    "gemma2": (13, {**FEED_FORWARD, "output": 8, "value": 9, "key": 10, "query": 11}),
    "gemma3_text": (15, {**FEED_FORWARD, "output": 8, "value": 11, "key": 12, "query": 13}),
}
EQUATIONS = {
    "query": "td,ndr->tnr",
    "key": "td,ndr->tnr",
    "value": "td,ndr->tnr",
    "output": "tnh,nhr->tr",
    "ffw_gating": "td,dr->tr",
    "ffw_gating_2": "td,dr->tr",
    "ffw_linear": "td,dr->tr",
}
OURS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "ffw_gating": "mlp.gate_proj",
    "ffw_gating_2": "mlp.up_proj",
    "ffw_linear": "mlp.down_proj",
}


def keras_lora(model: Any, path: Path, names: list[str], rank: int = 4) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """`backbone.save_lora_weights`, written out; (layer, name) → A and B."""
    config, draw = model.config, torch.Generator().manual_seed(7)
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "query": ((HEADS, width), SIZE),
        "key": ((PAIRS, width), SIZE),
        "value": ((PAIRS, width), SIZE),
        "output": ((HEADS, SIZE), width),
        "ffw_linear": ((inner,), width),
        **dict.fromkeys(("ffw_gating", "ffw_gating_2"), ((width,), inner)),
    }
    step, places = WALK[config.model_type]
    found = {}
    with h5py.File(path, "w") as file:
        file["lora/vars/rank"] = rank
        for number in range(config.num_hidden_layers):
            for name in names:
                into, out = shapes[name]
                a, b = torch.randn(*into, rank, generator=draw), torch.randn(rank, out, generator=draw)
                place = f"lora/{places[name] + number * step}/vars"
                file[f"{place}/lora_kernel_a"], file[f"{place}/lora_kernel_b"] = a.numpy(), b.numpy()
                found[number, name] = a, b
    return found


@pytest.mark.parametrize("names", [["query", "value"], list(OURS)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_of_keras_has_the_same_effect_in_peft(family: str, names: list[str], tmp_path: Path) -> None:
    model, path = tiny(family), tmp_path / "slang.lora.h5"
    kernels = keras_lora(model, path, names)
    assert keras.recognizes(path)
    adapter = read(path)
    assert isinstance(adapter, Adapter)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapter.peft)).eval()
    assert not set_peft_model_state_dict(adapted, adapter.tensors).unexpected_keys
    for (number, name), (a, b) in kernels.items():
        layer = adapted.base_model.model.model.layers[number].get_submodule(OURS[name])
        x = torch.randn(5, layer.in_features)
        shaped = x.view(5, HEADS, SIZE) if name == "output" else x
        expected = (torch.einsum(EQUATIONS[name], shaped, a) @ b).reshape(5, -1)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x) - layer.base_layer(x), expected, atol=1e-3, rtol=1e-4)
    adapter.config = model.config.to_dict()
    keras.write(adapter, tmp_path / "again.lora.h5")
    assert datasets(tmp_path / "again.lora.h5") == datasets(path)


def test_a_lora_of_keras_is_converted_on_from_the_peft_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its record says no dtype, which a Keras file has not."""
    model = tiny("gemma")
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    keras_lora(model, tmp_path / "slang.lora.h5", ["query", "value"])
    convert(tmp_path / "slang.lora.h5", "adapter", tmp_path / "slang", tmp_path / "base")
    assert "slang.lora.h5 holds no alpha, as no LoRA of KerasHub does" in capsys.readouterr().out
    assert json.loads((tmp_path / "slang/conversion.json").read_text())["dtype"] is None
    convert(tmp_path / "slang", "gguf", tmp_path / "gguf", tmp_path / "base")
    assert list((tmp_path / "gguf").glob("*.gguf"))


@pytest.mark.parametrize("alpha", [8, 12])
def test_a_scale_multiplied_into_b_is_proven_too(alpha: int, tmp_path: Path) -> None:
    model = tiny("gemma3_text")
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "slang")
    convert(tmp_path / "slang", "keras", tmp_path / "keras", tmp_path / "base")
    proof = json.loads((tmp_path / "keras/conversion.json").read_text())["proof"]
    assert proof["tensors_with_the_same_bits"] == proof["tensors"] == 4 * model.config.num_hidden_layers


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"layers_to_transform": [1]}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_of_peft_has_the_same_effect_in_keras(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, path = tiny(family), tmp_path / "slang.lora.h5"
    peft = {"r": 4, "lora_alpha": 8, "target_modules": [name.split(".")[1] for name in OURS.values()], **settings}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **peft)).eval()
    tensors = {}
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
            tensors[name.replace(".default", "")] = parameter.detach().clone()
    config = model.config.to_dict()
    keras.write(Adapter({key: peft[key] for key in peft if key != "layers_to_transform"}, tensors, config=config), path)
    step, places = WALK[family]
    with h5py.File(path) as file:
        for number in range(model.config.num_hidden_layers):
            for name, theirs in OURS.items():
                group = file[f"lora/{places[name] + number * step}/vars"]
                a, b = (torch.from_numpy(group[f"lora_kernel_{which}"][()]) for which in "ab")
                assert a.shape[-1] == len(b) == file["lora/vars/rank"][()]
                layer = adapted.base_model.model.model.layers[number].get_submodule(theirs)
                x = torch.randn(5, layer.in_features)
                shaped = x.view(5, HEADS, SIZE) if name == "output" else x
                found = (torch.einsum(EQUATIONS[name], shaped, a) @ b).reshape(5, -1)
                with torch.inference_mode():
                    expected = layer(x) - layer.base_layer(x) if hasattr(layer, "base_layer") else torch.zeros(())
                    torch.testing.assert_close(found, expected.expand_as(found), atol=2e-3, rtol=1e-4)
    back = read(path)
    # alpha / r, which is a power of two here, has gone into B.
    assert back.peft["r"] == back.peft["lora_alpha"] == 4 and set(back.tensors) == set(tensors)
    scale = 8 / 2 if settings.get("use_rslora") else 8 / 4
    for name, tensor in tensors.items():
        assert torch.equal(back.tensors[name], tensor * (scale if "lora_B" in name else 1))


def external(file: h5py.File, place: str) -> None:
    file[place] = h5py.ExternalLink("/etc/hostname", "/x")


def soft(file: h5py.File, place: str) -> None:
    file[place] = h5py.SoftLink("/layers/rms_normalization/vars/0")


def stored_elsewhere(file: h5py.File, place: str) -> None:
    file.create_dataset(place, (32,), "f4", external=[("/etc/hostname", 0, 128)])


def virtual(file: h5py.File, place: str) -> None:
    layout = h5py.VirtualLayout((32,), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", (32,))
    file.create_virtual_dataset(place, layout)


def references(file: h5py.File, place: str) -> None:
    file[place] = np.array([file.ref] * 32, h5py.ref_dtype)


def bomb(file: h5py.File, place: str) -> None:
    file.create_dataset(place, (1 << 40,), "f4", chunks=(1 << 20,), compression="gzip")


def not_numbers(file: h5py.File, place: str) -> None:
    file[place] = np.full(32, np.nan, np.float32)


def whole_numbers(file: h5py.File, place: str) -> None:
    file[place] = np.ones(32, np.int8)


def too_long(file: h5py.File, place: str) -> None:
    file[place] = np.ones(33, np.float32)


def missing(file: h5py.File, place: str) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (external, "link"),
        (soft, "link"),
        (stored_elsewhere, "plain array"),
        (virtual, "plain array"),
        (references, "floats"),
        (bomb, "plain array"),
        (not_numbers, "not finite|not a number"),
        (whole_numbers, "int8"),
        (too_long, "shape"),
        (missing, "has no"),
    ],
)
def test_hdf5_features_that_keras_does_not_use_are_refused(
    change: Callable[..., None], named: str, tmp_path: Path
) -> None:
    folder = preset(tiny("gemma2"), tmp_path / "preset")
    place = "layers/gemma_decoder_block_1/pre_ffw_norm/vars/0"
    with h5py.File(folder / "model.weights.h5", "a") as file:
        del file[place]
        change(file, place)
    with pytest.raises(UserError, match=named) as caught:
        for tensor in read(folder).tensors.values():
            tensor.read()
    assert "pre_ffw_norm" in str(caught.value) or "layers.1.pre_feedforward_layernorm" in str(caught.value)


@pytest.mark.parametrize("trials", [30, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("of_lora", [False, True])
def test_damaged_files_give_one_sentence(of_lora: bool, trials: int, tmp_path: Path) -> None:
    model = tiny("gemma2", num_hidden_layers=2, layer_types=None)
    folder = preset(model, tmp_path / "preset")
    path = folder / "model.weights.h5"
    if of_lora:
        keras_lora(model, path, ["query", "value"])
    whole, chance, refused = path.read_bytes(), random.Random(1), 0
    for trial in range(trials):
        damaged = bytearray(whole)
        if trial % 3:
            for _ in range(chance.choice((1, 32))):
                damaged[chance.randrange(min(len(whole), 6_000))] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(whole)) :]
        path.write_bytes(damaged)
        try:
            found = read(path if of_lora else folder)
            for tensor in [] if of_lora else found.tensors.values():
                tensor.read()
        except UserError as error:
            refused += 1
            assert str(folder) in str(error)
    assert refused > trials // 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["full_attention"] + ["sliding_attention"] * 6}, "order"),
        ({"attention_bias": True}, "biases"),
        ({"query_pre_attn_scalar": 77}, "query_pre_attn_scalar"),
        ({"hidden_activation": "relu"}, "activation"),
        ({"model_type": "llama"}, "llama"),
    ],
)
def test_a_model_that_kerashub_cannot_express_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    found = read(preset(tiny("gemma3_text"), tmp_path / "preset"))
    found.config = {**found.config, **change}
    with pytest.raises(UserError, match=named):
        keras.write(found, tmp_path / "keras")
    assert not (tmp_path / "keras").exists()


def test_the_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = preset(tiny("gemma2"), tmp_path / "preset")
    text = json.loads((folder / "config.json").read_text())
    for change, named in (({"class_name": "LlamaBackbone"}, "LlamaBackbone"), ({"config": {}}, "num_layers")):
        (folder / "config.json").write_text(json.dumps({**text, **change}))
        with pytest.raises(UserError, match=named):
            read(folder)


def test_an_adapter_without_its_base_or_with_dora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base=FOLDER"):
        keras.write(Adapter({"r": 1, "lora_alpha": 1}, {}), tmp_path / "a.lora.h5")
    config = tiny("gemma").config.to_dict()
    with pytest.raises(UserError, match="DoRA"):
        keras.write(Adapter({"r": 1, "lora_alpha": 1, "use_dora": True}, {}, config=config), tmp_path / "a.lora.h5")


def test_an_untied_output_layer_is_refused(tmp_path: Path) -> None:
    found = read(preset(tiny("gemma"), tmp_path / "preset"))
    found.tensors = {**found.tensors, "lm_head.weight": in_memory(torch.zeros(4, 4))}
    with pytest.raises(UserError, match="output layer"):
        keras.write(found, tmp_path / "keras")


def test_the_written_preset_loads_in_transformers_with_the_same_logits(tmp_path: Path) -> None:
    model = tiny("gemma3_text").eval()
    hf.write(read(preset(model, tmp_path / "preset")), tmp_path / "hf")
    ids = torch.arange(2, 42)[None]
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()(ids).logits
        torch.testing.assert_close(found, model(ids).logits)
