"""QLoRA: a base of 4-bit weights is trained on, its settings are at work, and the adapter leaves with the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import PagedAdamW32bit
from conftest import FAMILIES, fit_here, needs_task, tiny_gemma
from datasets import Dataset
from nemo.core.optim.optimizers import get_optimizer
from tiny_gemma4 import KINDS, tiny_folder4, tiny_gemma4
from torch import nn
from transformers import AutoTokenizer

from converters.convert import convert
from converters.nemo_file import read_nemo
from core.configuration import load_config, plain
from core.errors import UserError
from core.load_model import ALL_LINEAR, add_lora, load_base
from core.prompt import Prompt
from evaluation.compare import answer
from training.batches import tokenize
from training.gemma_lora import GemmaLoRA, available_optimizer
from training.memory import check_memory
from training.progress import RunProgress
from training.qlora import fuse_qlora_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUANTIZATION = plain(load_config(["peft=qlora"]).peft)["quantization"]
# The first review chatbot's settings, which the test below holds one by one.
SQUID_GAME = ["task=squid_game", "model=gemma-2b-it", "peft=qlora", "+experiment=squid_game_qlora"]


pytestmark = pytest.mark.usefixtures("one_thread")


def rows(base: Path, folder: Path, count: int) -> Dataset:
    file = folder / f"{count}.jsonl"
    lines = [{"input": "We " + "go " * (n % 5 + 1), "output": f"Slang: {'yes ' * (n % 3 + 1)}"} for n in range(count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompt = Prompt("{instruction}\n{response}", "{ask}", "{slang}")
    return tokenize(file, AutoTokenizer.from_pretrained(base), prompt, 512, folder / "cache")[0]


def fit(
    base: Path, folder: Path, count: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[GemmaLoRA, dict[str, Any]]:
    """Train for real; the module that was trained, with its trainer, and what was seen while it ran."""
    seen: dict[str, Any] = {"norms": [], "rates": [], "validations": [], "mlp_calls": 0, "module": None}
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_look(parameters: list[torch.Tensor], limit: float) -> torch.Tensor:
        norm = clip(parameters, limit)
        after = torch.stack([p.grad.norm() for p in parameters]).norm().item()
        seen["norms"].append((float(norm), after, sum(bool(p.grad.abs().sum() > 0) for p in parameters)))
        return norm

    def on_train_start(self: GemmaLoRA) -> None:
        seen["module"] = self
        layer = self.model.get_base_model().model.layers[0].mlp.gate_proj
        layer.register_forward_pre_hook(lambda module, _: _count(seen, torch.is_grad_enabled()))

    def on_validation_end(self: GemmaLoRA) -> None:
        seen["validations"].append(self.trainer.global_step)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_look)
    monkeypatch.setattr(GemmaLoRA, "on_train_start", on_train_start)
    monkeypatch.setattr(GemmaLoRA, "on_validation_end", on_validation_end)
    fit_here(load_config(words), base, rows(base, folder, count), rows(base, folder, 4), folder)
    return seen["module"], seen


def _count(seen: dict[str, Any], training: bool) -> None:
    seen["mlp_calls"] += training


def metrics(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_a_qlora_run_lowers_the_loss_and_its_adapter_works_on_the_base(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["peft=qlora", "task.train.epochs=4", "task.train.batch_size=8", "task.train.learning_rate=1e-2"]
    module, seen = fit(tiny_base, tmp_path, 16, words, monkeypatch)
    gemma = module.model.get_base_model()
    quantized = {name.rpartition(".")[2] for name, layer in gemma.named_modules() if isinstance(layer, Linear4bit)}
    assert quantized == {"base_layer"} and gemma.lm_head.weight.dtype in (torch.bfloat16, torch.float32)
    for layer in gemma.modules():
        if isinstance(layer, Linear4bit):
            state = layer.weight.quant_state
            assert layer.weight.dtype == torch.uint8 and state.quant_type == "nf4" and state.nested
    assert len(seen["validations"]) == 4
    # Every adapter has gradients in the last step, after three validations (bitsandbytes repacks weights there).
    assert seen["norms"][-1][2] == len(module.state_dict()) == 2 * 7 * 3
    losses = metrics(tmp_path, "train_loss")
    assert losses[-1] < losses[0] - 0.5

    nemo = read_nemo(tmp_path / "slang.nemo")
    assert nemo.quantization == QUANTIZATION
    whole, tokenizer = nemo.load_onto(tiny_base)
    as_trained, _ = nemo.load_onto(tiny_base, as_trained=True)
    assert not any(isinstance(layer, Linear4bit) for layer in whole.modules())
    assert any(isinstance(layer, Linear4bit) for layer in as_trained.modules())
    for model in (whole, as_trained):
        assert isinstance(answer(model, tokenizer, nemo.prompt, "We go", {"max_new_tokens": 4}, 0), str)
    for to in ("adapter", "merged"):
        convert(tmp_path / "slang.nemo", to, tmp_path / to, tiny_base)


@pytest.mark.parametrize("family", [*FAMILIES, *KINDS])
def test_the_qlora_layers_compute_what_peft_computes_on_the_dequantized_weights(family: str, tmp_path: Path) -> None:
    (tiny_gemma4(family) if family in KINDS else tiny_gemma(family, vocab_size=200)).save_pretrained(tmp_path)
    ids = torch.randint(200, (2, 40), generator=torch.Generator().manual_seed(0))
    results: list[Any] = []
    weights: dict[str, torch.Tensor] = {}
    for kind in ("ours", "peft", "whole"):
        quantization = None if kind == "whole" else QUANTIZATION
        base = load_base(tmp_path, torch.float32, quantization, torch.device("cpu"))
        if kind == "whole":
            for name, layer in base.named_modules():
                if name in weights:
                    layer.weight = nn.Parameter(weights[name])
        else:
            weights = {
                name: dequantize_4bit(layer.weight, layer.weight.quant_state)
                for name, layer in base.named_modules()
                if isinstance(layer, Linear4bit)
            }
        torch.manual_seed(1)
        base.config.use_cache = False
        targets = {"target_modules": ALL_LINEAR if family in KINDS else TARGETS}
        if family == "26b-a4b":
            targets["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
        model = add_lora(base, {"r": 4, "lora_alpha": 8, **targets}).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if kind == "ours":
            fuse_qlora_layers(model)
            changed = [name for name, layer in model.named_modules() if "forward" in vars(layer)]
            assert len(changed) == len(weights) and (family in KINDS or len(changed) == 7 * 3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), *others = results
    for other_loss, other_gradients in others:
        torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gemma_4_in_4_bits_keeps_router_tables_and_experts_whole(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_folder4(kind, tmp_path)
    base = load_base(tmp_path, torch.bfloat16, QUANTIZATION, torch.device("cpu"))
    whole = {name for name, weight in base.named_parameters() if weight.dtype == torch.bfloat16 and weight.ndim > 1}
    short = {
        name.removeprefix("model.").removesuffix(".weight").rpartition("layers.")[2].lstrip("0123456789.")
        for name in whole
    }
    assert short == {
        "embed_tokens",
        *({"embed_tokens_per_layer", "per_layer_model_projection"} if kind in ("e2b", "e4b") else ()),
        *({"router.proj", "experts.gate_up_proj", "experts.down_proj"} if kind == "26b-a4b" else ()),
    }
    check_memory(load_config(["peft=qlora"]), tmp_path, rows(tmp_path, tmp_path, 4), torch.bfloat16)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("QLoRA"))
    named = {part.split()[-3] for part in said.split(",")}
    assert named == {name.split(".")[0] for name in short}


@needs_task("squid_game")
def test_every_setting_of_the_review_chatbot_takes_effect(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *SQUID_GAME,
        "task.train.evaluate_every=2",
        "trainer.micro_batch_tokens=600",
    ]  # 500 steps are too many here
    module, seen = fit(tiny_base, tmp_path, 300, words, monkeypatch)
    trainer, gemma = module.trainer, module.model.get_base_model()
    lora = gemma.model.layers[0].mlp.down_proj
    assert (lora.r["default"], lora.scaling["default"], lora.lora_dropout["default"].p) == (16, 64 / 16, 0.01)
    assert lora.lora_dropout["default"].training
    adapted = {name.rpartition(".")[2] for name, layer in gemma.named_modules() if hasattr(layer, "lora_A")}
    assert adapted == set(TARGETS)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name and "bias" not in name for name in trained) and len(trained) == 2 * 7 * 3

    # 300 rows in steps of 16 × 8: three steps, the last one smaller.
    assert (trainer.current_epoch, trainer.global_step) == (1, 3)
    assert [len(list(step.micro_batches)) > 1 for step in trainer.train_dataloader] == [True, True, False]
    (optimizer,) = trainer.optimizers
    expected = PagedAdamW32bit if torch.cuda.is_available() else torch.optim.AdamW
    assert type(optimizer).__mro__[1] is expected or isinstance(optimizer, expected)
    assert optimizer.param_groups[0]["weight_decay"] == 0.001
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
    # Warm-up: ceil(0.03 × 3) = 1 step at half the rate, then the peak, then the cosine on its way down.
    assert metrics(tmp_path, "learning_rate") == pytest.approx([0.5e-4], rel=1e-5)  # a line every 25 steps and the last
    assert type(trainer.lr_scheduler_configs[0].scheduler).__name__ == "CosineAnnealing"
    for before, after, _ in seen["norms"]:
        assert after == pytest.approx(min(before, 0.3), rel=1e-3)
    assert max(before for before, *_ in seen["norms"]) > 0.3, "nothing was clipped"
    micro_batches = sum(len(step.micro_batches) for step in trainer.train_dataloader)
    assert seen["mlp_calls"] == 2 * micro_batches, "activations were not computed again"
    (progress,) = (callback for callback in trainer.callbacks if isinstance(callback, RunProgress))
    assert progress.every == 25 and list((tmp_path / "tensorboard").rglob("events.out.tfevents*"))
    assert seen["validations"] == [2, 3]
    if not torch.cuda.is_available():
        assert "adamw with 32-bit state" in capsys.readouterr().out


def test_paged_adamw_is_bitsandbytes_on_a_gpu_and_adamw_elsewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert available_optimizer("paged_adamw_32bit", "gpu") == "paged_adamw_32bit"
    assert get_optimizer("paged_adamw_32bit").func is PagedAdamW32bit
    assert available_optimizer("paged_adamw_32bit", "cpu") == "adamw"
    assert "adamw with 32-bit state" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"sgdw is unknown\. Known: adamw, paged_adamw_32bit"):
        load_config(["task.train.optimizer=sgdw"])


@pytest.mark.parametrize("wrong", [{"load_in_4bit": "yes"}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}])
def test_an_unknown_quantization_is_refused(wrong: dict[str, Any], tiny_base: Path) -> None:
    with pytest.raises(UserError, match=r"peft\.quantization"):
        load_base(tiny_base, torch.float32, wrong, torch.device("cpu"))
