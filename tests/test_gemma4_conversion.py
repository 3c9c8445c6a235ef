"""Gemma 4 of every kind survives conversions: as an adapter, merged, alone and inside the whole model it belongs to."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_here
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_gemma4 import KINDS, WHOLE, tiny_folder4, tiny_gemma4
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from converters import adapter as adapter_folder
from converters import hf
from converters.checkpoint import Adapter
from converters.convert import convert
from converters.layerwise_forward import logits
from converters.nemo_file import read_nemo
from converters.safetensors_file import write_with
from core.base_model import describe, local_base
from core.configuration import load_config
from core.errors import UserError
from core.prompt import Prompt
from training.batches import tokenize

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(3, 43) * 7 % 600  # longer than the window
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTED: dict[str, dict[str, Any]] = {  # by kind, what only it has among the targets
    "e2b": {"target_modules": [*SEVEN, "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"]},
    "e4b": {"target_modules": SEVEN, "use_rslora": True},
    "12b": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "26b-a4b": {"target_modules": ["q_proj", "down_proj"], "target_parameters": EXPERTS, "rank_pattern": {"q_proj": 2}},
    "31b": {"target_modules": SEVEN, "alpha_pattern": {"v_proj": 3}},
}


def quick(*kinds: str, of: Iterable[str] = KINDS) -> list[Any]:
    """All kinds `of` some, of which only `kinds` belong to the quick tests."""
    return [pytest.param(kind, marks=[] if kind in kinds else pytest.mark.slow) for kind in of]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 folder of the text model of each kind, as transformers saves it."""
    return {kind: tiny_folder4(kind, tmp_path_factory.mktemp(kind), torch.float32) for kind in KINDS}


def adapted(model: PreTrainedModel, **settings: Any) -> PeftModel:
    """peft's own model on `model`, with an adapter that changes what it says."""
    found = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)).eval()
    torch.manual_seed(0)
    for name, parameter in found.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return found


def say(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS[None], use_cache=False).logits[0].float()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def change(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


# --- the text model alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quick("e2b", "26b-a4b"))
def test_the_layerwise_forward_pass_equals_that_of_transformers_and_peft(kind: str, folders: dict[str, Path]) -> None:
    checkpoint, plain = hf.read(folders[kind]), say(tiny_gemma4(kind))
    found = logits(checkpoint, [IDS, IDS[:17]])
    torch.testing.assert_close(found[: len(IDS)], plain, atol=2e-5, rtol=0)
    torch.testing.assert_close(found[len(IDS) :], plain[:17], atol=2e-5, rtol=0)
    model = adapted(tiny_gemma4(kind), **ADAPTED[kind])
    tensors = {adapter_folder.peft_name(n): t for n, t in model.state_dict().items() if "lora_" in n}
    lora = Adapter({"r": 4, "lora_alpha": 8, **ADAPTED[kind]}, tensors)
    torch.testing.assert_close(logits(checkpoint, [IDS], lora), say(model), atol=5e-5, rtol=0)
    assert change(say(model), plain) > 0.1


@pytest.mark.parametrize("kind", quick("26b-a4b"))
def test_an_adapter_of_peft_survives_every_round_trip(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    base, model = folders[kind], adapted(tiny_gemma4(kind), **ADAPTED[kind])
    model.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", "nemo", tmp_path / "nemo", base)
    convert(tmp_path / "nemo/peft.nemo", "adapter", tmp_path / "back", base)
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(say(PeftModel.from_pretrained(tiny_gemma4(kind), tmp_path / "back").eval()), say(model))
    assert json.loads((tmp_path / "back/conversion.json").read_text())["loads_on"] == type(tiny_gemma4(kind)).__name__

    convert(tmp_path / "nemo/peft.nemo", "merged", tmp_path / "merged", base)
    merged, expected = load(tmp_path / "merged"), model.merge_and_unload().state_dict()
    assert type(merged) is type(tiny_gemma4(kind))
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", quick())
def test_a_model_survives_a_round_trip_and_speaks_both_dialects(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    convert(folders[kind], "nemo", tmp_path / "nemo")
    convert(next((tmp_path / "nemo").glob("*.nemo")), "hf", tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (folders[kind], tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "model.layers.1.layer_scalar" in after and torch.equal(say(load(tmp_path / "back")), say(tiny_gemma4(kind)))
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["global_head_dim"] == 32 and "per_layer_config" in config and "num_global_key_value_heads" in config


@pytest.mark.slow
@pytest.mark.parametrize("names", [EXPERTS[:1], EXPERTS[1:], ["model.layers.2.experts.gate_up_proj"]])
def test_one_parameter_of_the_experts_may_be_adapted_alone(
    names: list[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    base = folders["26b-a4b"]
    model = adapted(tiny_gemma4("26b-a4b"), target_modules=["q_proj"], target_parameters=names)
    model.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", "adapter", tmp_path / "back", base)
    assert torch.equal(say(PeftModel.from_pretrained(tiny_gemma4("26b-a4b"), tmp_path / "back").eval()), say(model))
    convert(tmp_path / "back", "merged", tmp_path / "merged", base)
    expected = model.merge_and_unload().state_dict()
    for name, tensor in load(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=1e-6)


def test_target_parameters_that_the_tensors_contradict_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    adapted(tiny_gemma4("26b-a4b"), target_modules=["q_proj"], target_parameters=EXPERTS).save_pretrained(
        tmp_path / "a"
    )
    file = tmp_path / "a/adapter_config.json"
    for wrong in (EXPERTS[:1], [], ["experts.gate_up_proj", "router.scale"]):
        file.write_text(json.dumps({**json.loads(file.read_text()), "target_parameters": wrong}))
        with pytest.raises(UserError, match="does not say what the LoRA of the experts"):
            convert(tmp_path / "a", "merged", tmp_path / "merged", folders["26b-a4b"])


def test_updates_of_keys_and_values_that_a_layer_borrows_are_left_out(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(tiny_gemma4("e2b"), target_modules=["q_proj", "k_proj"])
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old/adapter_model.safetensors"
    tensors = load_file(file)  # as trained by a transformers whose borrowing layers had projections of their own
    dead = {
        name.replace("layers.0.", "layers.7."): t.clone()
        for name, t in tensors.items()
        if "layers.0.self_attn.k" in name
    }
    save_file(tensors | dead, file)
    convert(tmp_path / "old", "adapter", tmp_path / "new", folders["e2b"])
    assert len(dead) == 2 and "has 2 tensors for layers that borrow keys and values" in capsys.readouterr().out
    assert torch.equal(say(PeftModel.from_pretrained(tiny_gemma4("e2b"), tmp_path / "new").eval()), say(model))


# --- the whole model ----------------------------------------------------------------------------------------------


def as_published(kind: str, folder: Path) -> Path:
    """A whole model as Google has it: shards, the old dialect, and keys and values in layers that borrow them."""
    tiny_folder4(kind, folder, torch.bfloat16, whole=True)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    full = next(iter(text.pop("per_layer_config").values()))
    text |= {"global_head_dim": full["head_dim"], "num_global_key_value_heads": full.get("num_key_value_heads")}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106, 50], "do_sample": True}))
    (folder / "processor_config.json").write_text("{}")
    tensors = load_file(folder / "model.safetensors")
    borrowing = text["num_hidden_layers"] - text.get("num_kv_shared_layers", 0)
    for layer in range(borrowing, text["num_hidden_layers"]):
        for part in ("k_proj", "v_proj", "k_norm"):
            own = f"model.language_model.layers.{layer % 5}.self_attn.{part}.weight"  # of the same kind of layer
            tensors[own.replace(f"layers.{layer % 5}", f"layers.{layer}")] = tensors[own] * 2
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number in (0, 1):
        shard = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[number::2]}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[number::2], shard)
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: as_published(kind, tmp_path_factory.mktemp(f"whole-{kind}")) for kind in WHOLE}


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


@pytest.fixture(params=quick("e2b", of=WHOLE))
def trained(
    request: pytest.FixtureRequest, wholes: dict[str, Path], tmp_path: Path
) -> tuple[str, Path, Path, PeftModel]:
    """Kind, the whole model's folder, that of the text model cut from it, and an adapter trained on the latter."""
    whole = wholes[request.param]
    convert(whole, "hf", tmp_path / "models/text")
    model = adapted(load(tmp_path / "models/text"), target_modules=["q_proj", "k_proj", "up_proj", "down_proj"])
    model.save_pretrained(tmp_path / "peft")
    return request.param, whole, tmp_path / "models/text", model


def test_a_whole_model_is_cut_to_its_text_model(
    trained: tuple[str, Path, Path, PeftModel], capsys: pytest.CaptureFixture[str]
) -> None:
    kind, whole, text, _ = trained
    model = load(text)
    assert type(model) is type(tiny_gemma4(kind)) and torch.equal(say(model), say(load(whole)))
    config = json.loads((text / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] and config["global_head_dim"] == 32
    assert config["per_layer_config"] and config["dtype"] == "bfloat16"
    assert (text / "generation_config.json").read_bytes() == (whole / "generation_config.json").read_bytes()
    assert not (text / "processor_config.json").exists()


@pytest.mark.slow
def test_an_adapter_works_on_the_class_that_it_is_named_for_and_on_no_other(
    trained: tuple[str, Path, Path, PeftModel], tmp_path: Path
) -> None:
    _, whole, text, model = trained
    convert(tmp_path / "peft", "adapter", tmp_path / "for-text", text)
    convert(tmp_path / "peft", "adapter", tmp_path / "for-whole", whole)
    convert(tmp_path / "peft", "adapter", tmp_path / "asked", text, whole=True)
    bare, wanted = say(load(whole)), say(model)
    for name in ("for-whole", "asked"):
        assert change(say(PeftModel.from_pretrained(load(whole), tmp_path / name).eval()), wanted) < 1e-5
        record = json.loads((tmp_path / name / "conversion.json").read_text())
        assert record["loads_on"] == type(load(whole)).__name__ != type(load(text)).__name__
    assert torch.equal(say(PeftModel.from_pretrained(load(text), tmp_path / "for-text").eval()), wanted)
    assert change(bare, wanted) > 0.1
    # and back, whatever class the names are of
    convert(tmp_path / "for-whole", "nemo", tmp_path / "nemo", text)
    convert(tmp_path / "nemo/for-whole.nemo", "adapter", tmp_path / "back", text)
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_what_was_trained_is_put_back_into_the_whole_model(
    trained: tuple[str, Path, Path, PeftModel], tmp_path: Path
) -> None:
    kind, whole, _, model = trained
    convert(tmp_path / "peft", "merged", tmp_path / "merged", whole)
    before, after = everything(whole), everything(tmp_path / "merged")
    changed = {name for name in before if not same(before[name], after[name])}
    layers = {name.partition(".lora_")[0] for name in load_file(tmp_path / "peft/adapter_model.safetensors")}
    assert before.keys() == after.keys()
    assert changed == {f"{layer.replace('base_model.model.model', 'model.language_model')}.weight" for layer in layers}
    for name in (hf.INDEX, "generation_config.json", "processor_config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    for shard in whole.glob("*.safetensors"):  # the same bytes at the same places
        assert shard.stat().st_size == (tmp_path / "merged" / shard.name).stat().st_size
        with safe_open(tmp_path / "merged" / shard.name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    whole_config, config = (json.loads((f / "config.json").read_text()) for f in (whole, tmp_path / "merged"))
    assert config["text_config"].pop("per_layer_config") and "per_layer_config" not in whole_config["text_config"]
    assert config == whole_config
    found = load(tmp_path / "merged")
    assert type(found) is type(load(whole))
    assert change(say(found), say(model)) < 0.1 * change(say(load(whole)), say(model))  # rounded to bfloat16
    proof = json.loads((tmp_path / "merged/conversion.json").read_text())["proof"]
    assert proof["tensors"] == len(before) and proof["tensors_with_the_same_bits"] == len(before) - len(changed)

    convert(tmp_path / "peft", "merged", tmp_path / "text", whole, whole=False)
    assert type(load(tmp_path / "text")) is type(tiny_gemma4(kind)) and torch.equal(
        say(load(tmp_path / "text")), say(found)
    )


@pytest.mark.slow
def test_a_bit_of_a_tower_that_changes_is_detected(
    wholes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(source: Path, target: Path, tensors: Any) -> None:
        write_with(source, target, tensors)
        values = load_file(target)
        for name in [name for name in values if name.endswith("vision_tower.encoder.layers.0.mlp.gate_proj.input_max")]:
            values[name] = torch.nextafter(values[name], torch.zeros_like(values[name]))
        save_file(values, target, metadata={"format": "pt"})

    monkeypatch.setattr(hf, "write_with", spoil)
    convert(wholes["e2b"], "hf", tmp_path / "text")
    adapted(load(tmp_path / "text"), target_modules=["q_proj"]).save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match=r"not faithful: model\.vision_tower\.\S+input_max has other values"):
        convert(tmp_path / "peft", "merged", tmp_path / "merged", wholes["e2b"])
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_whole_model_with_other_text_weights_than_were_trained_on_is_refused(
    trained: tuple[str, Path, Path, PeftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, text, _ = trained
    monkeypatch.chdir(tmp_path)  # where models/ is
    convert(tmp_path / "peft", "adapter", tmp_path / "ours", text)  # knows the hash of the text model
    convert(tmp_path / "ours", "merged", tmp_path / "merged", whole)
    other = json.loads((tmp_path / "ours/conversion.json").read_text())
    assert other["base"]["sha256"] == describe(text)["sha256"]
    file = next(file for file in sorted(text.glob("*.safetensors")))
    tensors = load_file(file)
    tensors["model.layers.1.layer_scalar"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="was trained on the text model text, which must be in models/text"):
        convert(tmp_path / "ours", "merged", tmp_path / "again", whole)
    other["base"]["sha256"] = describe(text)["sha256"]
    (tmp_path / "ours/conversion.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"model\.layers\.1\.layer_scalar is another than in"):
        convert(tmp_path / "ours", "merged", tmp_path / "again", whole)


def test_a_whole_model_is_asked_for_where_there_is_one(
    trained: tuple[str, Path, Path, PeftModel], tmp_path: Path
) -> None:
    _, whole, text, _ = trained
    with pytest.raises(UserError, match="is no whole Gemma 4; name the folder of one"):
        convert(tmp_path / "peft", "merged", tmp_path / "merged", text, whole=True)
    with pytest.raises(UserError, match="whole=true is for an adapter"):
        convert(whole, "hf", tmp_path / "hf", whole=True)


# --- after training -----------------------------------------------------------------------------------------------


def train(base: Path, folder: Path, *words: str) -> Path:
    """Two steps on `base`; the run's `.nemo`."""
    file, config = folder / "training.jsonl", load_config(["task.train.epochs=1", "task.train.batch_size=4", *words])
    rows = [{"input": f"We go {n}", "output": f"Slang: yes {n}"} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = Prompt("{instruction}\n{response}<eos>", "{ask}", "{slang}")
    tokens = tokenize(file, AutoTokenizer.from_pretrained(base), prompt, 512, folder / "cache")[0]
    fit_here(config, base, tokens, tokens, folder)
    return folder / "slang.nemo"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_exported(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.gemma_lora.weights_dtype", lambda: torch.float32)
    experts = ["+peft.target_parameters=[experts.gate_up_proj,experts.down_proj]", "peft.lora_dropout=0"]
    archive = train(folders[kind], tmp_path, "task.train.learning_rate=0.05", *(experts if kind == "26b-a4b" else []))
    model, _ = read_nemo(archive).load_onto(folders[kind], "cpu")
    learned = change(say(model), say(load(folders[kind])))
    convert(archive, "adapter", tmp_path / "adapter", folders[kind])
    assert torch.equal(say(PeftModel.from_pretrained(load(folders[kind]), tmp_path / "adapter").eval()), say(model))
    convert(archive, "merged", tmp_path / "merged", folders[kind])
    assert change(say(load(tmp_path / "merged")), say(model)) < 1e-3 * learned


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_a_run_on_a_whole_model_ends_in_that_whole_model(
    kind: str, wholes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, text = wholes[kind], local_base(wholes[kind], Path("models"))
    archive = train(text, tmp_path, "task.train.learning_rate=0.05")
    convert(archive, "merged", tmp_path / "merged", whole)
    before, after = everything(whole), everything(tmp_path / "merged")
    changed = {name for name in before if not same(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all("language_model.layers" in name for name in changed)
    trained, found, bare = read_nemo(archive).load_onto(text, "cpu")[0].float(), load(tmp_path / "merged"), load(whole)
    assert type(found) is type(bare) and change(say(found), say(trained)) < 0.1 * change(say(bare), say(trained))


# --- refused ------------------------------------------------------------------------------------------------------


def test_formats_that_have_no_place_for_it_say_which_do(folders: dict[str, Path], tmp_path: Path) -> None:
    adapted(tiny_gemma4("31b"), target_modules=["q_proj"]).save_pretrained(tmp_path / "peft")
    for to in ("nemo1", "nemo2"):
        for source in (folders["31b"], tmp_path / "peft"):
            with pytest.raises(UserError, match="for Gemma 1, 2 and 3, not for a 'gemma4_text'; to=megatron, nemo, "):
                convert(source, to, tmp_path / to, folders["31b"])
    assert not (tmp_path / "nemo1").exists() and not (tmp_path / "nemo2").exists()


def test_a_checkpoint_for_jax_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "gemma4").mkdir()
    (tmp_path / "gemma4/_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(UserError, match=r"is a checkpoint for JAX .* take the same model's Hugging Face folder"):
        convert(tmp_path / "gemma4", "hf", tmp_path / "out")


@pytest.mark.parametrize("kind", ["gemma3n_text", "vaultgemma", "gemma4_assistant"])
def test_relatives_are_refused(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    hf.write(hf.read(folders["31b"]), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(UserError, match=f"a model of type '{kind}'; only Gemma 1, 2, 3 and 4"):
        convert(folder, "nemo", tmp_path / "nemo")
