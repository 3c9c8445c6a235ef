"""Of a whole model, its text model is cut out exactly, and what is left out is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_gemma
from safetensors.torch import load_file, save_file
from tiny_gemma4 import WHOLE, tiny_folder4, tiny_tokenizer4
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from core.artifacts import BaseRecord
from core.base_model import RECORD, describe, ensure_base_model, licence_of
from core.configuration import load_config
from core.errors import UserError
from core.gemma_config import write_both_dialects
from core.text_model import INDEX, check_text_model, cut_text_model

TEXT = "The train left the station at noon, and then the rain began to fall on the long platform."
STOPS = {"eos_token_id": [1, 106, 50], "suppress_tokens": [258883, 258882], "temperature": 1.0}


@pytest.fixture(params=["e2b"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tiny_folder4(request.param, tmp_path / "my gemma", torch.float32, whole=True)
    (folder / "generation_config.json").write_text(json.dumps(STOPS))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    return folder


def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    tokens = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits


def expected(folder: Path) -> torch.Tensor:
    """The whole model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__.endswith("ForConditionalGeneration")
    return logits(model, tiny_tokenizer4())


def loaded(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def cut(folder: Path, models: Path) -> Path:
    return ensure_base_model(load_config([f"model.path={folder}", f"model.models_dir={models}"]).model)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_shards(folder: Path) -> None:
    """The weights in three files with an index, as large models are published; the second has towers alone."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors, key=lambda name: "language_model" not in name)
    parts = [names[:9], [name for name in names if "language_model" not in name], []]
    parts[2] = [name for name in names if name not in {*parts[0], *parts[1]}]
    weight_map = {}
    for number, part in enumerate(part for part in parts if part):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("whole", WHOLE, indirect=True)
@pytest.mark.parametrize("dialect", ["new", "old", "both"])
def test_model_path_takes_a_whole_model_and_leaves_its_folder_as_it_is(
    dialect: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((whole / "config.json").read_text())
    if dialect != "new":
        config = write_both_dialects(config)
    if dialect == "old":
        del config["text_config"]["per_layer_config"]
    (whole / "config.json").write_text(json.dumps(config))
    before = content(whole)
    folder = cut(whole, tmp_path / "models")
    said = capsys.readouterr().out
    assert content(whole) == before and folder.parent == tmp_path / "models"
    assert folder.name.startswith("my gemma-text-")
    model = loaded(folder)
    unified = config["model_type"] == "gemma4_unified"
    assert type(model).__name__ == ("Gemma4UnifiedForCausalLM" if unified else "Gemma4ForCausalLM")
    assert torch.equal(logits(model, tiny_tokenizer4()), expected(whole))
    made = json.loads((folder / "config.json").read_text())
    assert made["architectures"] == [type(model).__name__] and "vision_config" not in made
    assert made["global_head_dim"] == 32 and made["per_layer_config"]
    assert json.loads((folder / "generation_config.json").read_text()) == STOPS
    assert (folder / "chat_template.jinja").exists() and licence_of(folder) == "apache-2.0"
    towers = [name for name in load_file(whole / "model.safetensors") if "language_model" not in name]
    vision = [name for name in towers if "vision_tower" in name]
    assert bool(vision) != unified
    assert all(f"left out: {part}" in said for part in {name.split(".")[1] for name in towers})
    assert not vision or f"vision_tower, {len(vision)} tensors, " in said
    scalars = {name: t for name, t in load_file(folder / "model.safetensors").items() if name.endswith("layer_scalar")}
    assert len(scalars) == made["num_hidden_layers"] and all(tensor != 1 for tensor in scalars.values())


def test_it_is_cut_once_and_again_when_the_folder_changes(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = cut(whole, tmp_path / "models")
    made = (first / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    shutil.copytree(whole, tmp_path / "elsewhere" / whole.name)
    assert cut(whole, tmp_path / "models") == cut(tmp_path / "elsewhere" / whole.name, tmp_path / "models") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made and "Cutting" not in capsys.readouterr().out
    tensors = load_file(whole / "model.safetensors")
    tensors["model.language_model.norm.weight"][0] += 1
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    second = cut(whole, tmp_path / "models")
    assert second != first and describe(second)["sha256"] != describe(first)["sha256"]
    assert describe(second)["name"] == second.name and len(BaseRecord.read(second / RECORD).revision) == 64


def test_keys_and_values_of_borrowing_layers_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tiny_folder4("e2b", tmp_path / "whole", torch.bfloat16, whole=True)
    tensors = load_file(whole / "model.safetensors")
    layer = "model.language_model.layers.{}.self_attn.{}.weight"
    names = ("k_proj", "v_proj", "k_norm")
    tensors |= {layer.format(number, name): tensors[layer.format(0, name)] + 1 for number in (5, 6) for name in names}
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    wanted = expected(whole)
    folder = cut(whole, tmp_path / "models")
    size = 2 * sum(tensors[layer.format(0, name)].nbytes for name in names) / 1e6
    assert (
        f"left out: k_proj, v_proj and k_norm of the layers that borrow keys and values, where nothing reads them, "
        f"6 tensors, {size:,.1f} MB" in capsys.readouterr().out
    )
    assert torch.equal(logits(loaded(folder), tiny_tokenizer4()), wanted)


@pytest.mark.parametrize("whole", WHOLE, indirect=True)
def test_a_download_in_shards_is_cut_in_its_own_folder(whole: Path) -> None:
    wanted = expected(whole)
    in_shards(whole)
    cut_text_model(whole, whole)
    assert torch.equal(logits(loaded(whole), tiny_tokenizer4()), wanted)
    index = json.loads((whole / INDEX).read_text())["weight_map"]
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert sorted(set(index.values())) == files and not any("vision" in name for name in index)
    assert {name for file in files for name in load_file(whole / file)} == set(index)
    before = content(whole)
    cut_text_model(whole, whole)  # a text model by now
    assert content(whole) == before


def test_memory_does_not_grow_with_the_model(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.text_model.BLOCK", 1000)  # fewer bytes than any matrix has
    wanted = expected(whole)
    folder = cut(whole, tmp_path / "models")
    assert torch.equal(logits(loaded(folder), tiny_tokenizer4()), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [True, False])
def test_a_gemma_3_is_cut_too(pinned: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    text = tiny_gemma("gemma3_text").config.to_dict()
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    whole.eval().save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    if pinned:
        cut_text_model(folder := tmp_path / "whole", folder)
    else:
        folder = cut(tmp_path / "whole", tmp_path / "models")
    model = loaded(folder)
    assert type(model).__name__ == "Gemma3ForCausalLM" and licence_of(folder) == "gemma"
    assert not any("vision" in name for name in load_file(folder / "model.safetensors"))
    assert "global_head_dim" not in json.loads((folder / "config.json").read_text())
    torch.testing.assert_close(logits(model, tokenizer), logits(whole, tokenizer))


def lacks_a_tensor(folder: Path, config: dict[str, Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("layers.3.layer_scalar"))]
    save_file(tensors, folder / "model.safetensors")


def has_other_heads(folder: Path, config: dict[str, Any]) -> None:
    for layer in config["text_config"]["per_layer_config"].values():
        layer["head_dim"] = 64


def is_cut_off(folder: Path, config: dict[str, Any]) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])


def is_quantized(folder: Path, config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "awq"}


def has_an_index_that_leads_elsewhere(folder: Path, config: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


DAMAGES = [
    (lacks_a_tensor, r"lacks 1 tensors of its text model, model\.layers\.3\.layer_scalar among them"),
    (has_other_heads, "has shape .* config.json makes it"),
    (is_cut_off, "its data are cut off"),
    (is_quantized, "is quantized"),
]


@pytest.mark.parametrize(
    ("damage", "says"), [*DAMAGES, (has_an_index_that_leads_elsewhere, "which is not in its folder")]
)
def test_a_damaged_whole_model_is_one_sentence_and_leaves_nothing(
    damage: Any, says: str, whole: Path, tmp_path: Path
) -> None:
    config = json.loads((whole / "config.json").read_text())
    damage(whole, config)
    (whole / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        cut(whole, tmp_path / "models")
    assert not [path for path in tmp_path.glob("models/*gemma*") if path.is_dir()]


def names_no_layer(folder: Path, config: dict[str, Any]) -> None:
    config["text_config"]["per_layer_config"] = {"x": {"head_dim": 32}}


@pytest.mark.parametrize(("damage", "says"), [*DAMAGES, (names_no_layer, "describes no model: invalid literal")])
def test_a_damaged_text_model_is_one_sentence_too(damage: Any, says: str, tmp_path: Path) -> None:
    folder = tiny_folder4("e2b", tmp_path)
    check_text_model(folder)
    config = json.loads((folder / "config.json").read_text())
    damage(folder, both := {"text_config": config})
    (folder / "config.json").write_text(json.dumps({**both.pop("text_config"), **both}))
    with pytest.raises(UserError, match=says):
        check_text_model(folder)


@pytest.mark.parametrize(
    ("kind", "says"),
    [("gemma3n_text", "four streams"), ("vaultgemma", "nothing here converts or serves it"), ("llama", "unknown here")],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_done(kind: str, says: str, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=f"{says}.*Gemma 1, 2, 3 and 4"):
        cut(tmp_path, tmp_path / "models")
