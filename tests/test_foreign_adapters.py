"""Adapters as other tools leave them say in every format what plain peft says of them, and are refused where none can.

They are made, and judged, by plain transformers and peft on a tiny Gemma: what this project makes of names, patterns,
ranks and layers is not asked.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_gemma
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_gguf_gemma4 import expected_of, llama_cpp
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from commands.convert import main
from converters import adapter as adapter_folder
from converters.convert import convert
from core.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[2, *range(300, 330)]])
LAYERS = 6
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    sizes = {"vocab_size": len(tiny_tokenizer()) + 8, "layer_types": None, "num_hidden_layers": LAYERS}
    tiny_gemma("gemma3_text", **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def text_model(base: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def whole_model(base: Path) -> nn.Module:
    """The same text model in the class that also sees, as Unsloth, TRL and axolotl load a Gemma 3."""
    text = text_model(base)
    config = Gemma3Config(text_config=text.config.to_dict(), vision_config=VISION)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    return whole


def say(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits[0]


def trained(model: nn.Module, folder: Path, **settings: Any) -> Tensor:
    """An adapter in `folder`, saved by peft; what peft says with it when it is loaded from there again."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if ("lora_A" in name or "lora_B" in name) and "vision" not in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return say(PeftModel.from_pretrained(adapted.unload(), folder).eval())


def said_after(to: str, source: Path, base: Path, folder: Path) -> Tensor:
    """What plain peft says after a conversion to a format and, from its folder, back to an adapter."""
    convert(source, to, folder / to, base)
    if to == "merged":
        return say(text_model(folder / to))
    if to != "adapter":
        convert(folder / to, "adapter", folder / "back", base)
    return say(PeftModel.from_pretrained(text_model(base), folder / ("adapter" if to == "adapter" else "back")).eval())


WHOLE = r".*language_model.*\.(q_proj|down_proj)"
PATTERNS: dict[str, dict[str, Any]] = {
    "names": {
        "alpha_pattern": {"language_model.layers.1.self_attn.q_proj": 3},
        "rank_pattern": {"layers.0.mlp.down_proj": 2},
    },
    "expression": {"alpha_pattern": {r"^model\.language_model\.layers\.[02]\..*q_proj": 3}},
    "one that is no name of the whole model's": {"alpha_pattern": {r"^model\.layers\.0\..*q_proj": 3}},
}


def of_older_transformers(folder: Path) -> None:
    """The names that transformers before 4.52 gave the layers of a whole model, in tensors and patterns."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    new = {"model.language_model.": "language_model.model.", r"model\.language_model\.": r"language_model\.model\."}
    new |= {"language_model.layers": "language_model.model.layers"}

    def renamed(name: str) -> str:
        old = next((old for old in new if old in name), "")
        return name.replace(old, new[old], 1) if old else name

    save_file({renamed(name): tensor for name, tensor in load_file(file).items()}, file)
    settings = json.loads(config.read_text())
    for key in ("alpha_pattern", "rank_pattern"):
        settings[key] = {renamed(name): value for name, value in settings[key].items()}
    config.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("kind", "older"),
    [
        ("names", False),
        pytest.param("names", True, marks=pytest.mark.slow),
        pytest.param("expression", False, marks=pytest.mark.slow),
        pytest.param("expression", True, marks=pytest.mark.slow),
        pytest.param("one that is no name of the whole model's", False, marks=pytest.mark.slow),
    ],
)
def test_patterns_of_an_adapter_of_the_whole_model_are_looked_up_under_its_names(
    kind: str, older: bool, base: Path, tmp_path: Path
) -> None:
    source = tmp_path / "theirs"
    expected = trained(whole_model(base), source, target_modules=WHOLE, **PATTERNS[kind])
    if older:
        of_older_transformers(source)
    for to in ("merged", "adapter", "gguf"):
        torch.testing.assert_close(said_after(to, source, base, tmp_path), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_a_reading_that_loses_the_patterns_does_not_pass_the_proof(
    whole: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = whole_model(base) if whole else text_model(base)
    targets = WHOLE if whole else ["q_proj"]
    trained(model, tmp_path / "theirs", target_modules=targets, alpha_pattern={"layers.1.self_attn.q_proj": 3})
    monkeypatch.setattr(adapter_folder, "patterns", lambda values, default: {})
    for to in ("merged", "adapter", "nemo", "gguf"):
        with pytest.raises(UserError, match="the conversion is not faithful: m"):
            convert(tmp_path / "theirs", to, tmp_path / to, base)


LAYER_SETS: dict[str, dict[str, Any]] = {
    "some layers": {"layers_to_transform": [1, 2]},
    "a pattern of layers": {"target_modules": r".*layers\.2\..*_proj"},
    "one layer of one, one of another": {"target_modules": ["layers.0.self_attn.q_proj", "layers.2.mlp.up_proj"]},
    "values alone": {"target_modules": ["v_proj"]},
    "ranks": {"rank_pattern": {"v_proj": 2, r"layers\.[13]\.self_attn\.q_proj": 3}},
    "alphas": {"alpha_pattern": {"v_proj": 3, "layers.0.mlp.down_proj": 5}},
    "one pattern within another": {"alpha_pattern": {"v_proj": 3, "layers.0.self_attn.v_proj": 5}},
    "ranks of rsLoRA": {"use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "a late layer's values alone": {"target_modules": ["layers.5.self_attn.v_proj"]},
    "rank 1": {"r": 1},
}
QUICK = {
    ("nemo", "a pattern of layers"),
    ("gguf", "alphas"),
    ("nemo2", "ranks"),
    ("keras", "one pattern within another"),
    ("gguf", "a late layer's values alone"),
    ("keras", "rank 1"),
}
EVERY = [
    pytest.param(to, kind, marks=[] if (to, kind) in QUICK else pytest.mark.slow)
    for to in ("merged", "adapter", "nemo", "gguf", "nemo2", "keras")
    for kind in LAYER_SETS
]


@pytest.mark.slow
@pytest.mark.parametrize(("to", "kind"), EVERY)
def test_every_set_of_layers_ranks_and_alphas_survives_every_format_and_its_folder(
    to: str, kind: str, base: Path, tmp_path: Path
) -> None:
    expected = trained(text_model(base), tmp_path / "theirs", **LAYER_SETS[kind])
    # Of the largest logit: merged weights round elsewhere than an adapter beside them.
    tolerance = 2e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(said_after(to, tmp_path / "theirs", base, tmp_path), expected, atol=tolerance, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a pattern of layers", "ranks", "alphas"])
def test_llama_cpp_itself_says_the_same_with_the_file(kind: str, base: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(
        text_model(base),
        LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["q_proj", "v_proj", "down_proj"], **LAYER_SETS[kind]}),
    )
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "theirs")
    convert(base, "gguf", tmp_path / "model")
    convert(tmp_path / "theirs", "gguf", tmp_path / "lora", base)
    (model,), (lora,) = ((tmp_path / name).glob("*.gguf") for name in ("model", "lora"))
    size = len(tiny_tokenizer()) + 8
    plain, found = (torch.tensor(llama_cpp(model, file, (), size)["log_probabilities"]) for file in (None, lora))
    expected = expected_of(PeftModel.from_pretrained(text_model(base), tmp_path / "theirs").eval())
    torch.testing.assert_close(found, expected, atol=0.04, rtol=0)
    assert (plain - expected).abs().max() > 0.4


def test_a_dora_on_some_layers_is_refused_by_megatron_with_what_to_do(base: Path, tmp_path: Path) -> None:
    trained(text_model(base), tmp_path / "theirs", use_dora=True, layers_to_transform=[1])
    with pytest.raises(UserError, match=r"Megatron has it on all that it joins; .* to=merged"):
        convert(tmp_path / "theirs", "nemo2", tmp_path / "nemo2", base)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "eva", "mica", "bias"])
def test_beginnings_that_leave_the_base_alone_are_folded(start: str, base: Path, tmp_path: Path) -> None:
    settings = {"bias": "all"} if start == "bias" else {"init_lora_weights": True if start == "eva" else start}
    expected = trained(text_model(base), tmp_path / "theirs", **settings)
    if start == "eva":  # which would need a data set
        config = tmp_path / "theirs/adapter_config.json"
        values = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}}
        config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    torch.testing.assert_close(said_after("merged", tmp_path / "theirs", base, tmp_path), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_pissa_that_peft_made_plain_is_folded(base: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(text_model(base), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    first = tmp_path / "first"
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(first)
    adapted.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data *= 1.3
    expected = say(adapted.eval())
    adapted.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(first))
    torch.testing.assert_close(said_after("merged", tmp_path / "theirs", base, tmp_path), expected, atol=1e-5, rtol=0)


def test_what_sees_without_having_been_trained_is_left_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = trained(whole_model(base), tmp_path / "theirs", target_modules=["q_proj", "v_proj"])
    file = tmp_path / "theirs/adapter_model.safetensors"
    assert any("vision_tower" in name for name in load_file(file))
    torch.testing.assert_close(said_after("merged", tmp_path / "theirs", base, tmp_path), expected, atol=1e-5, rtol=0)
    assert "4 tensors without effect, for vision_tower: left out" in capsys.readouterr().out
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"adapts what sees or hears too \(vision_tower\)"):
        convert(tmp_path / "theirs", "nemo", tmp_path / "nemo", base)


@pytest.mark.slow
def test_weights_of_older_peft_are_read_without_running_their_pickle(base: Path, tmp_path: Path) -> None:
    expected = trained(text_model(base), tmp_path / "theirs")
    file = tmp_path / "theirs/adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "theirs/adapter_model.bin")
    file.unlink()
    torch.testing.assert_close(said_after("merged", tmp_path / "theirs", base, tmp_path), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "prefix"), [("lora", ""), pytest.param("dora", "language_model.", marks=pytest.mark.slow)]
)
def test_an_adapter_of_mlx_is_read(kind: str, prefix: str, base: Path, tmp_path: Path) -> None:
    """Its arithmetic, as mlx_lm/tuner/lora.py and dora.py have it, is that of peft with alpha = scale · rank."""
    peft, mlx, scale = tmp_path / "peft", tmp_path / "mlx", 2.5
    settings = {"r": 4, "lora_alpha": 4 * scale, "layers_to_transform": [4, 5], "use_dora": kind == "dora"}
    expected = trained(text_model(base), peft, **settings)
    tensors = {}
    for name, tensor in load_file(peft / "adapter_model.safetensors").items():
        layer, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        theirs = {"A.weight": "lora_a", "B.weight": "lora_b", "magnitude_vector": "m"}[part]
        tensors[f"{prefix}{layer}.{theirs}"] = (tensor if theirs == "m" else tensor.T).contiguous()
    mlx.mkdir()
    save_file(tensors, mlx / "adapters.safetensors")
    save_file(tensors, mlx / "0000100_adapters.safetensors")
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": {"rank": 4, "scale": scale, "dropout": 0.0}}
    (mlx / "adapter_config.json").write_text(json.dumps({**config, "model": "mlx-community/gemma-3-270m-bf16"}))
    torch.testing.assert_close(said_after("merged", mlx, base, tmp_path), expected, atol=1e-5, rtol=0)
    if kind == "lora":
        torch.testing.assert_close(said_after("nemo", mlx, base, tmp_path), expected, atol=1e-5, rtol=0)
        (mlx / "adapter_config.json").write_text(json.dumps({**config, "fine_tune_type": "full"}))
        with pytest.raises(UserError, match=r"fine_tune_type 'full'; fuse it with mlx_lm\.fuse"):
            convert(mlx, "nemo", tmp_path / "full", base)


def test_folders_of_trainings_and_of_other_tools_are_named_for_what_they_are(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained(text_model(base), out / "checkpoint-90")
    for name in ("checkpoint-100", "checkpoint-20"):
        shutil.copytree(out / "checkpoint-90", out / name)
    with pytest.raises(UserError, match=r"output folder with 3 checkpoints, .* such as the last, .*/checkpoint-100$"):
        convert(out, "merged", tmp_path / "merged", base)
    convert(out / "checkpoint-100", "nemo", tmp_path / "nemo", base)
    for name, says in (
        ("pytorch_model.bin", "a model as pickles"),
        ("global_step10/x", "DeepSpeed"),
        ("pytorch_model_fsdp_0/.metadata", "FSDP"),
    ):
        folder = tmp_path / name.partition("/")[0].partition(".")[0]
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"")
        with pytest.raises(UserError, match=says):
            convert(folder, "merged", tmp_path / "merged", base)
    shutil.copyfile(tmp_path / "nemo/checkpoint-100.nemo", tmp_path / "nemo/other.nemo")
    with pytest.raises(UserError, match=r"holds 2 models: checkpoint-100\.nemo, other\.nemo\. Name one"):
        convert(tmp_path / "nemo", "adapter", tmp_path / "adapter", base)


def test_a_tensor_under_two_names_and_an_endless_alpha_are_refused(base: Path, tmp_path: Path) -> None:
    trained(text_model(base), tmp_path / "theirs", target_modules=["q_proj"])
    file, config = (tmp_path / "theirs" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors, settings = load_file(file), json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "lora_alpha": 10**400}))
    with pytest.raises(UserError, match=r"must be given and positive, and at most 65,536"):
        convert(tmp_path / "theirs", "nemo", tmp_path / "nemo", base)
    config.write_text(json.dumps(settings))
    save_file(tensors | {name.removeprefix("base_model.model."): 2 * value for name, value in tensors.items()}, file)
    with pytest.raises(UserError, match=r"holds tensors of one layer under several names"):
        convert(tmp_path / "theirs", "nemo", tmp_path / "nemo", base)


def test_adapters_that_peft_keeps_under_names_are_named(base: Path, tmp_path: Path) -> None:
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    get_peft_model(text_model(base), settings, adapter_name="french").save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"theirs is no model itself, but holds some: \S+/theirs/french\. Name one of"):
        convert(tmp_path / "theirs", "nemo", tmp_path / "nemo", base)
    snapshot = tmp_path / "models--my-org--gemma/snapshots/0123"
    shutil.copytree(base, snapshot)
    with pytest.raises(UserError, match=r"holds some: \S+/models--my-org--gemma/snapshots/0123\. Name one of them"):
        convert(snapshot.parent.parent, "nemo", tmp_path / "nemo")


def test_a_target_is_named_for_its_source_and_never_takes_its_place(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(text_model(base), tmp_path / "adapter-1.1", target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    main(["source=adapter-1.1", "to=adapter", f"base={base}"])
    own = tmp_path / "exports/adapter-1.1/adapter"
    before = (own / "adapter_model.safetensors").read_bytes()
    for source, given, target in ((own, base, own), (own, base, own.parent), (tmp_path / "adapter-1.1", own, own)):
        with pytest.raises(UserError, match=r"(would be replaced, and .* is read from there|was not made by this)"):
            convert(source, "merged", target, given)
    assert (own / "adapter_model.safetensors").read_bytes() == before
    monkeypatch.chdir(own)
    main(["source=.", "to=nemo", f"base={base}", f"out={tmp_path / 'nemo'}"])
    assert [file.name for file in (tmp_path / "nemo").glob("*.nemo")] == ["adapter.nemo"]


def test_an_adapter_that_names_no_base_takes_the_one_that_is_given(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = trained(text_model(base), tmp_path / "theirs")
    config = tmp_path / "theirs/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    torch.testing.assert_close(said_after("merged", tmp_path / "theirs", base, tmp_path), expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"the adapter does not say its base; name its folder with base=FOLDER"):
        convert(tmp_path / "theirs", "nemo", tmp_path / "nemo")
