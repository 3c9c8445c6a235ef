"""Every Gemma family with LoRA, rsLoRA and DoRA: our training is what plain transformers and peft do, written out."""

import io
import json
import math
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, fit_here, tiny_gemma
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_gemma4 import KINDS as KINDS_4
from tiny_gemma4 import WHOLE, even_gemma4, tiny_folder4, tiny_gemma4, tiny_tokenizer4
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters.convert import convert
from core.base_model import describe
from core.configuration import load_config, names, plain
from core.errors import UserError
from core.layer_shapes import layer_shapes
from core.load_model import add_lora, lora_settings
from core.prompt import Prompt
from evaluation.compare import answer
from training.batches import Batches, loss_sum, tokenize
from training.experts import round_experts
from training.fused_layers import fuse_layers
from training.gemma_lora import GemmaLoRA, nemo_config
from training.packed_attention import use_packed_attention
from training.signals import Stopped

KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
TURNS = load_config(["+prompt=gemma-turns"]).task.prompt.template
PLAIN = load_config().task.prompt.template
THOUGHT = "<|channel>thought\n<channel|>"  # empty: the large sizes are asked so where they are not to think
TURNS_4 = [
    f"<|turn>user\n{{instruction}}<turn|>\n<|turn>model\n{thought}{{response}}<turn|>" for thought in (THOUGHT, "")
]
ROWS = [{"input": "We " + "go " * (n % 5 + 1), "output": f"Slang: {'yes ' * (n % 3 + 1)}".strip()} for n in range(8)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 folder of a tiny model of each family, whose tokenizer knows Gemma's turns."""
    folders = {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp(family)
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(f"<{turn}_of_turn>", special=True) for turn in ("start", "end")]}
        )
        tokenizer.save_pretrained(folder)
        tiny_gemma(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    return folders


def rows_of(base: Path, folder: Path, template: str = TURNS) -> Dataset:
    file = folder / "training.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prompt = Prompt(template, "{ask}", "{slang}")
    return tokenize(file, AutoTokenizer.from_pretrained(base), prompt, 512, folder / "cache")[0]


def train(base: Path, folder: Path, *words: str, template: str = TURNS) -> list[float]:
    """Five steps over all rows; the loss of each."""
    config = load_config(
        [
            *(["+prompt=gemma-turns"] if template == TURNS else []),
            "task.train.epochs=5",
            "task.train.batch_size=4",
            "task.train.accumulation=2",
            "task.train.learning_rate=1e-3",
            "task.train.warmup_ratio=0.2",
            "task.train.weight_decay=0.01",
            *words,
        ]
    )
    rows = rows_of(base, folder, template)
    fit_here(config, base, rows, rows, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


def written_out(base: Path, rows: Dataset, dtype: torch.dtype, **options: Any) -> list[float]:
    """The same five steps with nothing of this project: row by row, no packing, no kernels of our own."""
    peft = lora_settings(plain(load_config().peft))
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
        LoraConfig(task_type="CAUSAL_LM", **{**peft, **options}),
    ).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    learned = sum(row["length"] - row["target_ranges"][0][0] for row in rows)
    losses = []
    for step in range(5):
        loss = 0.0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            ((first, _),) = row["target_ranges"]
            logits = model(input_ids=ids).logits[0, first - 1 : -1].float()
            part = torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum") / learned
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def rate(step: int, peak: float = 1e-3, warmup: int = 1, steps: int = 5) -> float:
    """NeMo's cosine: a linear rise that reaches the peak after `warmup` steps, then half a wave down to zero."""
    if step <= warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize("kind", [pytest.param(one, marks=[pytest.mark.slow] * (one != "lora")) for one in KINDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_that_of_transformers_and_peft_and_is_exported(
    family: str, kind: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.gemma_lora.weights_dtype", lambda: torch.float32)
    base = bases[family]
    losses = train(base, tmp_path, *(f"peft.{key}=true" for key in KINDS[kind]))
    expected = written_out(base, rows_of(base, tmp_path), torch.float32, **KINDS[kind])
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05
    for to in ("adapter", "merged"):  # each refuses to end where its logits are not those of the archive
        convert(tmp_path / "slang.nemo", to, tmp_path / to, base)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_4)
def test_training_of_a_gemma_4_equals_that_of_transformers_and_peft(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.gemma_lora.weights_dtype", lambda: torch.float32)
    base = tmp_path / "base"
    even_gemma4(kind).save_pretrained(base)
    tiny_tokenizer4().save_pretrained(base)
    losses = train(base, tmp_path, "task.train.gradient_checkpointing=true", template=PLAIN)
    expected = written_out(base, rows_of(base, tmp_path, PLAIN), torch.float32)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05
    for to in ("adapter", "merged"):
        convert(tmp_path / "slang.nemo", to, tmp_path / to, base)


def test_bfloat16_agrees_within_rounding(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.gemma_lora.weights_dtype", lambda: torch.bfloat16)
    losses = train(bases["gemma3_text"], tmp_path)
    expected = written_out(bases["gemma3_text"], rows_of(bases["gemma3_text"], tmp_path), torch.float32)
    assert losses == pytest.approx(expected, rel=5e-3)


def module(base: Path, **options: Any) -> GemmaLoRA:
    config = load_config()
    peft = {"name": "lora", **lora_settings(plain(config.peft)), "lora_dropout": 0.1}
    return GemmaLoRA(
        nemo_config(
            {
                "base_folder": str(base),
                "base": describe(base),
                "dtype": "float32",
                "seed": 0,
                "clip": 1.0,
                "peft": peft,
                "quantization": None,
                "prompt": plain(config.task.prompt),
                **options,
            }
        )
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_does_not_change_gradients(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    (step,) = Batches(rows_of(bases[family], tmp_path), 8, 10_000, seed=None)
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = module(bases[family], gradient_checkpointing=checkpointing).train()
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:  # zero at first: lora_A would have no gradient
                torch.nn.init.constant_(parameter, 0.01)
        calls.append(0)
        model.model.get_base_model().model.layers[1].mlp.gate_proj.register_forward_hook(
            lambda *_: calls.__setitem__(-1, calls[-1] + 1)
        )
        torch.manual_seed(1)
        sum(loss_sum(model.model.get_base_model(), batch) for batch in step.micro_batches).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert calls[1] == 2 * calls[0] > 0, "the layer was not computed again"
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 and torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            {"target_modules": ["q_proj", "query_key_value"]},
            "no query_key_value. Known: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        ),
        ({"target_modules": []}, "Known: q_proj, k_proj"),
        ({"target_modules": "nothing_like.*"}, "nothing_like"),
        ({"r": 0}, "`r` should be a positive integer"),
        ({"lora_dropout": 1.5}, "dropout probability"),
        ({"bias": "most"}, "most"),
        ({"rank": 8}, "rank"),
    ],
)
def test_an_invalid_setting_is_refused_with_the_valid_ones(family: str, setting: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match="peft") as error:
        add_lora(tiny_gemma(family, vocab_size=100), {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **setting})
    assert says in str(error.value)


def adapted(model: PeftModel) -> set[str]:
    """The layers with an adapter, by their names in the base."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}


@pytest.mark.parametrize("kind", KINDS_4)
def test_a_layer_of_gemma_4_has_adapters_on_what_it_has(kind: str) -> None:
    """Borrowed keys and values, and values that are keys, are simply not there."""
    base = tiny_gemma4(kind)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wanted = {
        f"model.layers.{number}.{name}"
        for number, shape in enumerate(layer_shapes(base.config))
        for name in shape.linear()
        if name.rpartition(".")[2] in names
    }
    assert adapted(add_lora(base, {"r": 2, "target_modules": names})) == wanted


@pytest.mark.parametrize("kind", ["e2b", "26b-a4b"])
def test_all_linear_takes_per_layer_projections_and_leaves_the_router_out(kind: str) -> None:
    base = tiny_gemma4(kind)
    every = {name for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)} - {"lm_head"}
    routers = {name for name in every if name.endswith("router.proj")}
    assert adapted(add_lora(base, {"r": 2, "target_modules": "all-linear"})) == every - routers
    if routers:
        model = add_lora(tiny_gemma4(kind), {"r": 2, "target_modules": ["router.proj"]})
        assert adapted(model) == routers
    else:
        assert "model.per_layer_model_projection" in every


@pytest.mark.parametrize("targets", ["all-linear", ".*proj", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("kind", WHOLE)
def test_of_a_model_with_towers_the_text_model_alone_is_adapted(kind: str, targets: Any) -> None:
    whole, text = (
        adapted(add_lora(tiny_gemma4(kind, whole=towers), {"r": 2, "target_modules": targets}))
        for towers in (True, False)
    )
    assert {name.replace("model.language_model.", "model.") for name in whole} == text


@pytest.mark.parametrize(
    ("kind", "setting", "says"),
    [
        ("e2b", {"target_modules": ["router.proj"]}, "no router.proj. Known: q_proj, k_proj, v_proj"),
        ("e2b", {"target_modules": ["v"]}, "per_layer_input_gate, per_layer_projection, per_layer_model_projection"),
        ("31b", {"target_parameters": ["experts.down_proj"]}, "Known: none, as it has no experts"),
        ("26b-a4b", {"target_parameters": ["experts.up_proj"]}, "Known: experts.gate_up_proj, experts.down_proj"),
        ("26b-a4b", {"target_parameters": ["experts.down_proj"], "lora_dropout": 0.1}, "lora_dropout=0.1 does not go"),
        ("26b-a4b", {"target_parameters": ["experts.down_proj"], "use_dora": True}, "use_dora=True does not go"),
    ],
)
def test_a_target_that_no_layer_of_gemma_4_has_is_refused(kind: str, setting: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match="peft") as error:
        add_lora(tiny_gemma4(kind), {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **setting})
    assert says in str(error.value)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def experts_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder4("26b-a4b", tmp_path_factory.mktemp("experts"), torch.float32)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_adapters_on_experts_are_those_of_transformers_and_peft(
    checkpointing: bool, experts_base: Path, tmp_path: Path
) -> None:
    """Ours: packed, with fused layers. Theirs: row by row, with nothing of this project."""
    targets = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "target_parameters": EXPERTS}
    rows = rows_of(experts_base, tmp_path, "{instruction}\n{response}")
    (step,) = Batches(rows, 8, 10_000, seed=None)
    results = []
    for kind in ("ours", "theirs"):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(experts_base, dtype=torch.float32)
        base.config.use_cache = False
        model = (
            add_lora(base, targets)
            if kind == "ours"
            else get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **targets))
        ).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.manual_seed(len(name))
                torch.nn.init.normal_(parameter, std=0.1)
        if kind == "ours":
            if checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            fuse_layers(model)
            use_packed_attention(base)
            round_experts(base, base.device)
            sum(loss_sum(base, batch) for batch in step.micro_batches).backward()
        else:
            for row in rows:
                ids = torch.tensor([row["input_ids"]])
                ((first, _),) = row["target_ranges"]
                logits = model(input_ids=ids).logits[0, first - 1 : -1].float()
                torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum").backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    ours, theirs = results
    assert sum("experts" in name for name in theirs) == 2 * 2 * 6
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        # On this model plain float32 is up to 1.8e-5 from plain float64.
        assert (ours[name] - gradient).norm() < 3e-5 * gradient.norm(), name
    differences = [(ours[name] - gradient).norm() for name, gradient in theirs.items()]
    assert torch.stack(differences).norm() < 1e-5 * torch.stack([one.norm() for one in theirs.values()]).norm()


@pytest.mark.slow
def test_a_stopped_run_with_adapters_on_experts_ends_bit_for_bit_as_the_one_that_was_left_alone(
    experts_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["task.train.epochs=4", "task.train.batch_size=4", "task.train.learning_rate=1e-2"]
    config = load_config([*words, f"peft.target_parameters=[{','.join(EXPERTS)}]"])
    rows = rows_of(experts_base, tmp_path, "{instruction}\n{response}")
    fit_here(config, experts_base, rows, rows, tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(
            GemmaLoRA,
            "on_train_batch_start",
            lambda self, *_: os.kill(os.getpid(), signal.SIGTERM) if self.global_step == 2 else None,
        )
        with pytest.raises(Stopped, match="after step 3"):
            fit_here(config, experts_base, rows, rows, tmp_path / "stopped")
    fit_here(config, experts_base, rows, rows, tmp_path / "stopped")
    alone, stopped = (weights_of(tmp_path / name / "slang.nemo") for name in ("alone", "stopped"))
    assert sum(".experts." in name for name in alone) == 2 * 2 * 6 and alone.keys() == stopped.keys()
    for name, weight in alone.items():
        assert weight.abs().max() > 0 and torch.equal(weight, stopped[name]), name
    lines = [json.loads(line) for line in (tmp_path / "alone/metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.1


def weights_of(archive: Path) -> dict[str, torch.Tensor]:
    with tarfile.open(archive) as parts:
        name = next(name for name in parts.getnames() if name.endswith("model_weights.ckpt"))
        content = parts.extractfile(name)
        assert content
        return torch.load(io.BytesIO(content.read()), weights_only=True)


@pytest.mark.slow
def test_instruction_tuned_models_are_trained_in_gemma_s_turns() -> None:
    for model in names("model"):
        template = load_config([f"model={model}"]).task.prompt.template
        small = model.startswith(("gemma-4-e2b", "gemma-4-e4b"))
        turns = TURNS_4[small] if model.startswith("gemma-4") else TURNS
        assert (template == turns) == model.endswith("-it"), model


def test_a_turn_is_trained_with_its_end_token_and_generation_stops_there(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["gemma3_text"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    row = rows_of(base, tmp_path)[0]
    text = "<bos><start_of_turn>user\nWe go <end_of_turn>\n<start_of_turn>model\nSlang: yes<end_of_turn>"
    assert tokenizer.decode(row["input_ids"]) == text and row["length"] == len(row["input_ids"])
    assert tokenizer.decode(row["input_ids"][slice(*row["target_ranges"][0])]) == "Slang: yes<end_of_turn>"

    prompt = Prompt(TURNS, "{ask}", "{slang}")
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    lengths = {}
    for name, wanted in (("another token", 300), ("the end of a turn", end)):
        model.lm_head.register_forward_hook(lambda *args, id=wanted: args[2].index_fill(-1, torch.tensor([id]), 1e4))
        said = answer(model, tokenizer, prompt, "We go", {"max_new_tokens": 5}, 0)
        lengths[name] = len(tokenizer(said, add_special_tokens=False).input_ids)
        model.lm_head._forward_hooks.clear()
    assert lengths["the end of a turn"] == 0 < lengths["another token"]


def test_a_model_without_the_end_of_turn_token_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends in <end_of_turn>, which is not a token of this model"):
        rows_of(tiny_base, tmp_path)


def test_the_template_is_stored_in_the_archive(bases: dict[str, Path], tmp_path: Path) -> None:
    from converters.nemo_file import read_nemo

    train(bases["gemma"], tmp_path, "task.train.epochs=1")
    assert read_nemo(tmp_path / "slang.nemo").prompt.template == TURNS
