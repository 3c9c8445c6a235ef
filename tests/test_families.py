"""Every Gemma family with LoRA, rsLoRA and DoRA: our training is what plain transformers and peft do, written out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, fit_here, tiny_gemma
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters.convert import convert
from core.base_model import describe
from core.configuration import load_config, names, plain
from core.errors import UserError
from core.load_model import add_lora, lora_settings
from core.prompt import Prompt
from evaluation.compare import answer
from training.batches import Batches, loss_sum, tokenize
from training.gemma_lora import GemmaLoRA, nemo_config

KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
TURNS = load_config(["+prompt=gemma-turns"]).task.prompt.template
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


def train(base: Path, folder: Path, *words: str) -> list[float]:
    """Five steps over all rows; the loss of each."""
    config = load_config(
        [
            "+prompt=gemma-turns",
            "task.train.epochs=5",
            "task.train.batch_size=4",
            "task.train.accumulation=2",
            "task.train.learning_rate=1e-3",
            "task.train.warmup_ratio=0.2",
            "task.train.weight_decay=0.01",
            *words,
        ]
    )
    rows = rows_of(base, folder)
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


@pytest.mark.parametrize("kind", KINDS)
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


def test_instruction_tuned_models_are_trained_in_gemma_s_turns() -> None:
    for model in names("model"):
        template = load_config([f"model={model}"]).task.prompt.template
        assert (template == TURNS) == model.endswith("-it"), model


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
