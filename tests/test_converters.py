"""A conversion is exact, proven, streamed, and refuses what it cannot trust."""

import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FAMILIES, ROOT, tiny_gemma
from nemo.core.classes import ModelPT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters import adapter as adapter_folder
from converters import hf, nemo
from converters.byte_ranges import whole_file
from converters.checkpoint import Adapter, Checkpoint, LazyTensor, in_memory
from converters.conversion import resolve_source
from converters.convert import convert, table
from converters.layerwise_forward import logits
from converters.nemo_file import read_nemo
from converters.prove import Differences, differences, prove
from converters.torch_file import MAX_PICKLE, read_tensors
from core.base_model import describe
from core.errors import UserError
from core.prompt import Prompt

PROMPT = {
    "template": "Instruction:\n{instruction}\n\nResponse:\n{response}",
    "instruction": "{context}",
    "response": "Slang: {slang}",
    "fields": {"context": "A rainy day."},
}
TARGETS = ["down_proj", "q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
IDS = torch.arange(3, 43) * 7 % 600

pytestmark = pytest.mark.usefixtures("one_thread")


def write_archive(path: Path, config: object, weights: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in (
            ("./model_config.yaml", yaml.safe_dump(config).encode()),
            ("./model_weights.ckpt", weights),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family, of transformers' own making; Gemma 3 in bfloat16, the others in float32."""
    folders = {"gemma3_text": tiny_base}
    for family in FAMILIES[:2]:
        folders[family] = tmp_path_factory.mktemp(family)
        AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folders[family])
        tiny_gemma(family, vocab_size=600).save_pretrained(folders[family])
    return folders


def adapted(base: Path, **settings: Any) -> PeftModel:
    """peft's own model on `base`, in float32, with an adapter that changes what it says."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})
    model = get_peft_model(model, config).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def say(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS[None]).logits[0].float()


@pytest.fixture
def archive(tiny_base: Path, tmp_path: Path) -> Path:
    """A `.nemo` as a training leaves it, written without this project."""
    peft = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "target_modules": TARGETS}
    config = {"base": describe(tiny_base), "dtype": "bfloat16", "prompt": PROMPT, "peft": {"name": "lora", **peft}}
    adapter = {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in adapted(tiny_base).named_parameters()
        if "lora_" in name
    }
    weights = io.BytesIO()
    torch.save(adapter, weights)
    return write_archive(tmp_path / "slang.nemo", config, weights.getvalue())


# --- exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layerwise_forward_pass_equals_that_of_transformers_and_peft(family: str, bases: dict[str, Path]) -> None:
    checkpoint = hf.read(bases[family])
    texts = [IDS, IDS[:17]]
    plain = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    found = logits(checkpoint, texts)
    torch.testing.assert_close(found[: len(IDS)], say(plain), atol=2e-5, rtol=0)
    torch.testing.assert_close(found[len(IDS) :], say(plain)[:17], atol=2e-5, rtol=0)
    for settings in KINDS.values():
        model = adapted(bases[family], **settings)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
        tensors = {adapter_folder.peft_name(name): tensor for name, tensor in tensors.items()}
        lora = Adapter({"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}, tensors)
        torch.testing.assert_close(logits(checkpoint, [IDS], lora), say(model), atol=5e-5, rtol=0)
        assert (say(model) - say(plain)).abs().max() > 0.1


ONCE_EACH = set(zip(FAMILIES, KINDS, strict=True))
EVERY = [
    pytest.param(family, kind, marks=[] if (family, kind) in ONCE_EACH else pytest.mark.slow)
    for family in FAMILIES
    for kind in KINDS
]


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_an_adapter_survives_every_round_trip(family: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, model = bases[family], adapted(bases[family], **KINDS[kind])
    model.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", "nemo", tmp_path / "nemo", base)
    convert(tmp_path / "nemo/peft.nemo", "adapter", tmp_path / "back", base)
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(say(PeftModel.from_pretrained(whole, tmp_path / "back").eval()), say(model))

    for source in ("peft", "nemo/peft.nemo"):
        convert(tmp_path / source, "merged", tmp_path / "merged", base)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert merged.dtype == AutoModelForCausalLM.from_pretrained(base).dtype
        # peft's own merge, in float32, rounded to the base's dtype as ours
        expected = adapted(base, **KINDS[kind]).merge_and_unload().state_dict()
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(
                tensor.float(), expected[name], rtol=2**-8 if tensor.itemsize == 2 else 2e-6, atol=1e-6
            )
        assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a").input_ids[0] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_survives_a_round_trip_through_nemo_byte_for_byte(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    Prompt(**PROMPT).save(bases[family])
    convert(bases[family], "nemo", tmp_path / "nemo")
    (bases[family] / "prompt.json").unlink()
    (file,) = (tmp_path / "nemo").glob("*.nemo")
    convert(file, "hf", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (bases[family] / name).read_bytes()
    before, after = load_file(bases[family] / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (bases[family], tmp_path / "back"))
    assert theirs == ours
    assert Prompt.load(tmp_path / "back") == Prompt(**PROMPT)
    with tarfile.open(file) as tar:  # what anybody finds in it: torch's own file, whole
        weights = torch.load(io.BytesIO(tar.extractfile("./model_weights.ckpt").read()), weights_only=True)
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_large_models_are_written_in_shards(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "MAX_SHARD", "20KB")
    convert(tiny_base, "hf", tmp_path / "shards")
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "shards" / hf.INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file(tiny_base / "model.safetensors").values())
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_base, tmp_path / "shards"))
    assert torch.equal(say(one), say(other))
    convert(tmp_path / "shards", "nemo", tmp_path / "nemo")


def test_merged_weights_are_the_exact_sum_rounded_once(archive: Path, tiny_base: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    convert(archive, "merged", target, tiny_base)
    adapter = read_nemo(archive).adapter
    before, after = load_file(tiny_base / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in adapter:
            a, b = adapter[f"{layer}.lora_A.weight"].double(), adapter[f"{layer}.lora_B.weight"].double()
            exact = weight.double() + 8 / 4 * b @ a
            half_a_unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)  # of 8 bits
            assert ((after[name].double() - exact).abs() <= half_a_unit * 1.001 + 1e-7).all(), name
            assert not torch.equal(after[name], weight), name
        else:
            assert torch.equal(after[name], weight), name
    assert AutoTokenizer.from_pretrained(target)("a").input_ids[0] == 2


def test_adapter_folder_gives_the_same_logits_in_plain_peft(archive: Path, tiny_base: Path, tmp_path: Path) -> None:
    target = tmp_path / "exports" / "adapter"
    convert(archive, "adapter", target, tiny_base)
    source, _ = read_nemo(archive).load_onto(tiny_base, "cpu")
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), target).eval()
    assert torch.equal(say(opened), say(source))
    proof = json.loads((target / "conversion.json").read_text())["proof"]
    assert proof["max_logit_difference"] == 0 and proof["top1_agreement"] == 1
    assert proof["tensors"] == proof["tensors_with_the_same_bits"] == 2 * len(TARGETS) * 3
    assert Prompt.load(target) == Prompt(**PROMPT)


def test_nemo_restores_what_was_converted(archive: Path, tiny_base: Path, tmp_path: Path) -> None:
    from training.gemma_lora import GemmaLoRA  # registers with NeMo

    convert(archive, "adapter", tmp_path / "adapter", tiny_base)
    convert(tmp_path / "adapter", "nemo", tmp_path / "nemo", tiny_base)
    restored = ModelPT.restore_from(str(tmp_path / "nemo/adapter.nemo"), map_location="cpu")
    assert isinstance(restored, GemmaLoRA) and restored.prompt == Prompt(**PROMPT)
    expected = read_nemo(archive).adapter
    assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in restored.state_dict().items())
    assert read_nemo(tmp_path / "nemo/adapter.nemo").base == {**read_nemo(archive).base, "folder": str(tiny_base)}


# --- proven -------------------------------------------------------------------------------------------------------


def test_a_difference_of_one_bit_or_one_shape_is_detected(tiny_base: Path) -> None:
    source, target = hf.read(tiny_base), hf.read(tiny_base)
    assert prove(source, target, None, None).max_logit_difference == 0
    name = "model.layers.1.mlp.up_proj.weight"
    changed = source.tensors[name].read().clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0, dtype=torch.bfloat16))
    target.tensors = {**target.tensors, name: in_memory(changed)}
    with pytest.raises(UserError, match=f"not faithful: {name} has other values"):
        prove(source, target, None, None)
    assert (
        prove(source, target, None, {"mean_kl_divergence": 1e-3}).tensors_with_the_same_bits == len(source.tensors) - 1
    )
    target.tensors = {**target.tensors, name: in_memory(torch.zeros_like(changed))}
    with pytest.raises(UserError, match="not faithful: mean_kl_divergence is"):
        prove(source, target, None, {"mean_kl_divergence": 1e-3})
    del target.tensors[name]
    with pytest.raises(UserError, match=f"not faithful: {name} is only in the source"):
        prove(source, target, None, None)


def test_a_tokenizer_that_lost_its_bos_is_detected(tiny_base: Path) -> None:
    source, target = hf.read(tiny_base), hf.read(tiny_base)
    content = json.loads((tiny_base / "tokenizer.json").read_text())
    content["post_processor"] = None
    target.files = {**target.files, "tokenizer.json": json.dumps(content).encode()}
    with pytest.raises(UserError, match="makes other tokens"):
        prove(source, target, None, None)


def test_a_failed_conversion_leaves_no_files(
    archive: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = adapter_folder.write

    def lose_a_sign(content: Adapter, target: Path) -> None:
        name = next(iter(content.tensors))
        write(Adapter(**{**vars(content), "tensors": {**content.tensors, name: -content.tensors[name]}}), target)

    monkeypatch.setattr(adapter_folder, "write", lose_a_sign)
    with pytest.raises(UserError, match="not faithful"):
        convert(archive, "adapter", tmp_path / "exports" / "adapter", tiny_base)
    assert list((tmp_path / "exports").iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_gives_one_sentence_and_leaves_no_files(tiny_base: Path, tmp_path: Path) -> None:
    # No file may grow beyond 100 KB, which is what a full disk looks like to a program.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from commands.convert import main; from core.errors import run; run(main)"
    )
    words = [f"source={tiny_base}", "to=hf", f"out={tmp_path}/exports/x"]
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "could not be written to" in result.stderr and "GB are free" in result.stderr
    assert "Traceback" not in result.stderr and list((tmp_path / "exports").iterdir()) == []


def test_a_user_s_folder_is_not_overwritten(archive: Path, tiny_base: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "novel.txt").write_text("chapter one")
    with pytest.raises(UserError, match="was not made by this command"):
        convert(archive, "adapter", target, tiny_base)
    assert (target / "novel.txt").read_text() == "chapter one"


# --- adapters of other tools --------------------------------------------------------------------------------------


def foreign(model: PeftModel, folder: Path, rename: tuple[str, str] = ("", ""), **settings: Any) -> Path:
    model.save_pretrained(folder)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({name.replace(*rename): tensor for name, tensor in load_file(file).items()}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(
    ("rename", "settings"),
    [
        (("model.layers", "model.language_model.layers"), {"target_modules": r"(?:.*?(?:language|text).*?(?:q_proj))"}),
        (("model.layers", "language_model.model.layers"), {"auto_mapping": {"base_model_class": "x"}}),
        ((".lora_A.", ".lora_A.default."), {"peft_version": "0.99", "inference_mode": False}),
        (("base_model.model.", ""), {"task_type": None, "bias": "none"}),
        (("", ""), {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [0, 1, 2]}),
    ],
)
def test_adapters_of_other_tools_are_read(
    rename: tuple[str, str], settings: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    model = adapted(tiny_base)
    folder = foreign(model, tmp_path / "theirs", rename, **settings)
    convert(folder, "adapter", tmp_path / "ours", tiny_base)
    assert adapter_folder.read(tmp_path / "ours").base["sha256"] == describe(tiny_base)["sha256"]
    whole = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert torch.equal(say(PeftModel.from_pretrained(whole, tmp_path / "ours").eval()), say(model))


def test_rank_patterns_dtypes_and_single_layers_are_kept(tiny_base: Path, tmp_path: Path) -> None:
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]
    model = adapted(tiny_base, target_modules=layers, rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 3})
    model = model.to(torch.bfloat16).float()
    theirs = foreign(model, tmp_path / "theirs")
    half = {name: tensor.bfloat16() for name, tensor in load_file(theirs / "adapter_model.safetensors").items()}
    save_file(half, theirs / "adapter_model.safetensors")
    convert(theirs, "nemo", tmp_path / "nemo", tiny_base)
    convert(tmp_path / "nemo/theirs.nemo", "merged", tmp_path / "merged", tiny_base)
    expected = model.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=1e-6)
    assert all(tensor.dtype == torch.bfloat16 for tensor in nemo.read(tmp_path / "nemo/theirs.nemo").tensors.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alora_invocation_tokens": [5]}, "an activated LoRA, which acts only after certain tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers of its base"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"init_lora_weights": "pissa"}, "changes the base too"),
        ({"some_lora_of_tomorrow": {"a": 1}}, "some_lora_of_tomorrow is set"),
        ({"r": 8}, "of rank 8 has lora_A"),
        ({"r": True}, "r is True"),
        ({"r": 10**12}, "r and lora_alpha must"),
        ({"use_dora": True}, "must have lora_A, lora_B, lora_magnitude_vector"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern has"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
    ],
)
def test_adapters_other_than_plain_lora_are_refused_with_a_reason(
    settings: dict[str, Any], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    folder = foreign(adapted(tiny_base), tmp_path / "theirs", **settings)
    with pytest.raises(UserError, match=message):
        convert(folder, "merged", tmp_path / "merged", tiny_base)
    assert not (tmp_path / "merged").exists()


def test_a_fully_trained_layer_beside_the_lora_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = foreign(adapted(tiny_base), tmp_path / "theirs", (".layers.0.self_attn.q_proj.lora_A", ".embed_tokens"))
    with pytest.raises(UserError, match=r"embed_tokens\.weight is not part of a LoRA"):
        convert(folder, "nemo", tmp_path / "nemo", tiny_base)


# --- refused: the wrong, the damaged, the hostile -------------------------------------------------------------------


def test_the_wrong_base_is_refused(archive: Path, tmp_path: Path, bases: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="was trained on"):
        convert(archive, "adapter", tmp_path / "adapter", bases["gemma2"])
    assert not (tmp_path / "adapter").exists()
    adapted(bases["gemma3_text"]).save_pretrained(tmp_path / "peft")  # says no hash, but does not fit either
    tiny_gemma("gemma3_text", hidden_size=64, vocab_size=600).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="name the right base"):
        convert(tmp_path / "peft", "merged", tmp_path / "merged", tmp_path / "wide")


def spoiled(base: Path, folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    """A copy of `base` with other tensors (None drops one) or another configuration."""
    folder.mkdir()
    values = {**json.loads((base / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(values))
    state = {**load_file(base / "model.safetensors"), **(tensors or {})}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors")
    return folder


NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({NORM: torch.full((32,), torch.nan)}, {}, f"{NORM} holds values that are not finite"),
        ({NORM: torch.tensor([torch.inf] + 31 * [0.0])}, {}, f"{NORM} holds values that are not finite"),
        ({NORM: torch.zeros(33)}, {}, rf"{NORM} has shape \[33\]; its configuration asks for \[32\]"),
        ({NORM: torch.zeros(32, dtype=torch.int8)}, {}, f"{NORM} is of I8"),
        ({Q: None}, {}, f"has no {Q}"),
        ({"model.vision.weight": torch.zeros(2)}, {}, "holds model.vision.weight"),
        ({"lm_head.weight": torch.zeros(600, 32)}, {}, "lm_head.weight differs from the embedding"),
        ({}, {"model_type": "llama"}, "only Gemma 1, 2, 3 and 4"),
        ({}, {"model_type": ["x"]}, "only Gemma 1, 2, 3 and 4"),
        ({}, {"num_hidden_layers": 10**9}, "which no Gemma has"),
        ({}, {"num_hidden_layers": 2}, "is none of a gemma3_text"),
        ({}, {"hidden_size": "32"}, "its configuration is none of a gemma3_text"),
        ({}, {"num_attention_heads": 0}, "gemma3_text|shape"),
        ({}, {"quantization_config": {"load_in_4bit": True}}, "is quantized"),
    ],
)
def test_a_model_that_contradicts_its_configuration_is_refused(
    tensors: dict[str, Any], config: dict[str, Any], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    folder = spoiled(tiny_base, tmp_path / "base", tensors, **config)
    with pytest.raises(UserError, match=message):
        convert(folder, "nemo", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_embedding_that_was_saved_twice_is_written_once(tiny_base: Path, tmp_path: Path) -> None:
    embedding = load_file(tiny_base / "model.safetensors")["model.embed_tokens.weight"]
    twice = spoiled(tiny_base, tmp_path / "twice", {"lm_head.weight": embedding.clone()})
    convert(twice, "hf", tmp_path / "once")
    assert "lm_head.weight" not in load_file(tmp_path / "once/model.safetensors")
    untied = spoiled(tiny_base, tmp_path / "untied", {"lm_head.weight": embedding * 2}, tie_word_embeddings=False)
    convert(untied, "nemo", tmp_path / "nemo")
    convert(tmp_path / "nemo/untied.nemo", "hf", tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back/model.safetensors")["lm_head.weight"], embedding * 2)


def test_the_text_model_of_a_multimodal_gemma_is_read(tiny_base: Path, tmp_path: Path) -> None:
    state = {f"language_model.{name}": t for name, t in load_file(tiny_base / "model.safetensors").items()}
    (tmp_path / "sees").mkdir()
    save_file({**state, "vision_tower.weight": torch.zeros(3)}, tmp_path / "sees/model.safetensors")
    config = {"model_type": "gemma3", "text_config": json.loads((tiny_base / "config.json").read_text())}
    (tmp_path / "sees/config.json").write_text(json.dumps(config))
    convert(tmp_path / "sees", "hf", tmp_path / "text")
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_base, tmp_path / "text"))
    assert torch.equal(say(one), say(other))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("open('exploded', 'w').write('x')",))


def test_a_pickle_in_an_archive_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = io.BytesIO()
    torch.save({"a": Bomb()}, weights)
    for content in (weights.getvalue(), pickle.dumps(Bomb())):
        with pytest.raises(UserError, match=r"is refused: it holds more than tensors|ckpt is damaged or not"):
            read_nemo(write_archive(tmp_path / "bomb.nemo", {"base": {}}, content))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("record", "content", "says"),
    [
        ("byteorder", b"big", "big-endian"),
        ("data/0", bytes(4), "does not lie in the file"),
        ("", b"", "compressed"),
        ("data.pkl", bytes(MAX_PICKLE + 1), "67,108,865 bytes"),
    ],
)
def test_archives_that_torch_does_not_write_are_refused(record: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if record else zipfile.ZIP_DEFLATED) as archive:
        for name, whole_record in records.items():
            archive.writestr(name, content if name == f"weights/{record}" else whole_record)
    with pytest.raises(UserError, match=says):
        read_tensors(whole_file(path))


@pytest.mark.parametrize("state", [{"a": torch.eye(3).to_sparse()}, {"a": 3}, [torch.ones(2)]])
def test_anything_but_named_plain_tensors_is_refused(state: Any, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match=r"sparse|something else than tensors"):
        read_tensors(whole_file(tmp_path / "weights.ckpt"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model_config.yaml", tarfile.SYMTYPE),
        ("model_weights.ckpt", tarfile.LNKTYPE),
        ("../x", tarfile.REGTYPE),
        ("/etc/x", tarfile.REGTYPE),
        ("files/../../x", tarfile.REGTYPE),
        ("pipe", tarfile.FIFOTYPE),
    ],
)
def test_archive_members_that_lead_outside_are_not_followed(name: str, kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "links.nemo"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(UserError, match="not a checkpoint to trust"):
        read_nemo(path)


def test_content_that_would_expand_without_bound_is_refused(tmp_path: Path) -> None:
    laughs = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text in (laughs, "[" * 5000, "x" * 2**21):
        path = tmp_path / "bomb.nemo"
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("model_config.yaml")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        with pytest.raises(UserError, match=r"not a whole \.nemo|more than any file of its kind needs"):
            read_nemo(path)
    crowded = tmp_path / "crowded.nemo"
    for names, says in ([f"{number}" for number in range(101)], "101 members"), (["a", "./a"], "twice"):
        with tarfile.open(crowded, "w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))
        with pytest.raises(UserError, match=says):
            read_nemo(crowded)
    packed = tmp_path / "packed.nemo"
    with tarfile.open(packed, "w:gz") as tar:
        member = tarfile.TarInfo("model_config.yaml")
        member.size = 2**24
        tar.addfile(member, io.BytesIO(bytes(2**24)))
    with pytest.raises(UserError, match="is compressed; unpack it"):
        read_nemo(packed)


def test_a_shard_outside_its_folder_is_not_read(tiny_base: Path, tmp_path: Path) -> None:
    folder = spoiled(tiny_base, tmp_path / "base")
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {NORM: "../../secret.safetensors"}}))
    with pytest.raises(UserError, match="no file of its own folder"):
        convert(folder, "nemo", tmp_path / "out")


def test_a_file_that_is_not_an_archive_gives_one_sentence(tmp_path: Path) -> None:
    for content in (b"", b"not a tar", b"\0" * 10_240):
        (tmp_path / "x.nemo").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.nemo is (not a whole \.nemo|damaged or not what)"):
            read_nemo(tmp_path / "x.nemo")
    with pytest.raises(UserError, match="no such file"):
        read_nemo(tmp_path / "y.nemo")


@pytest.mark.slow
def test_an_error_on_the_command_line_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.nemo").write_bytes(b"not a tar")
    result = subprocess.run(
        [sys.executable, "-m", "commands.convert", f"source={tmp_path}/x.nemo", "to=adapter"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "x.nemo is damaged or not what its name says" in result.stderr and "Traceback" not in result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("Loading ")]  # a slow machine
    assert len(lines) == 1


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Cut off, or with some bits turned: as often near the beginning and the end, where the structure is."""
    found = bytearray(content)
    if chance.random() < 0.3:
        return bytes(found[: chance.randrange(len(found))])
    for _ in range(chance.choice((1, 1, 3, 30))):
        near = min(2000, len(found))
        at = chance.choice(
            (chance.randrange(len(found)), chance.randrange(near), len(found) - 1 - chance.randrange(near))
        )
        found[at] ^= 1 << chance.randrange(8)
    return bytes(found)


def values_of(content: Checkpoint | Adapter) -> dict[str, torch.Tensor]:
    return {name: t.read() if isinstance(t, LazyTensor) else t for name, t in content.tensors.items()}


@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["adapter", "hf", "nemo", "nemo adapter"])
def test_thousands_of_damaged_files_each_give_one_sentence(
    kind: str, rounds: int, archive: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from converters.merge_lora import lora_updates
    from converters.validation import check_shapes, validated

    if kind == "adapter":
        source = tmp_path / "peft"
        convert(archive, "adapter", source, tiny_base)
    elif kind == "hf":
        source = spoiled(tiny_base, tmp_path / "base")
    elif kind == "nemo":
        source = tmp_path / "base.nemo"
        nemo.write(hf.read(spoiled(tiny_base, tmp_path / "base")), source)
    else:
        source = archive
    files = [source] if source.is_file() else sorted(path for path in source.iterdir() if path.suffix != ".md")
    module = {"adapter": adapter_folder, "hf": hf}.get(kind, nemo)
    expected = values_of(module.read(source))
    chance, refused = random.Random(rounds), 0
    for file in files:
        whole = file.read_bytes()
        for _ in range(rounds // len(files)):
            file.write_bytes(damaged(whole, chance))
            try:
                found = module.read(source)
                if isinstance(found, Checkpoint):
                    check_shapes(found, source)
                    found.tensors = validated(found.tensors, source)
                else:
                    lora_updates(found, source)
                values = values_of(found)
            except UserError as error:
                assert str(source) in str(error) and len(str(error)) < 600, error
                refused += 1
            else:  # a value of a format without checksums, a word of the configuration
                if module is nemo:
                    assert all(torch.equal(values[name], expected[name]) for name in expected)
        file.write_bytes(whole)
    assert refused > rounds / 2


# --- the front door -----------------------------------------------------------------------------------------------


def test_help_shows_the_declarations_of_the_formats() -> None:
    lines = table().splitlines()
    for name, title, source in (
        ("nemo", f"{nemo.TITLE}, adapter", "adapter"),
        ("hf", f"{hf.TITLE}, whole model", "nemo"),
    ):
        assert any(line.startswith(f"| {name} | {title} | ") and source in line for line in lines)
    assert any(line.startswith("| merged |") and "nemo, mlx, adapter" in line for line in lines)


def test_a_hub_model_is_resolved_by_name_and_a_wrong_path_is_not(base_folder: Path, tmp_path: Path) -> None:
    assert resolve_source("google/gemma-3-270m").resolve() == base_folder
    with pytest.raises(UserError, match=r"there is no runs/slang\.nemo|there is no .*nope"):
        convert(tmp_path / "nope", "nemo", tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "words", "message"),
    [
        ("merged", {}, "there is nothing to merge"),
        ("adapter", {}, "which adapter does not hold; to=hf does"),
        ("nemo", {"dtype": "q9"}, "dtype=q9 is unknown to nemo"),
    ],
)
def test_content_that_a_format_cannot_store_is_refused(
    to: str, words: dict[str, str], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        convert(tiny_base, to, tmp_path / "out", **words)
    assert list(tmp_path.iterdir()) == []


def test_equal_logits_have_no_difference_and_what_is_no_number_is_never_equal() -> None:
    logits = torch.randn(3, 50)
    assert differences(logits, logits.clone()) == Differences(0.0, 0.0, 0.0, 1.0)
    other = logits.clone()
    other[1, 7] += 1
    assert differences(logits, other).max_logit_difference == pytest.approx(1.0, abs=1e-6)
    other[1, 7] = logits[1, 7] = torch.nan
    assert not differences(logits, other).max_logit_difference <= 0.0


def test_waiting_threads_sleep_unless_somebody_has_chosen() -> None:
    """As `make convert` sets it, in a process that has not loaded torch."""
    code = (
        "import os; from core.machine import let_waiting_threads_sleep as f; f(); print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, expected in ((None, "passive"), ("active", "active")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": given} if given else {}
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert said.stdout == f"{expected}\n"
