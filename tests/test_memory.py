"""What a run will need is said before it starts, and is what it then takes."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ROOT, needs_task, tiny_gemma
from tiny_gemma4 import KINDS, tiny_gemma4

from core.configuration import load_config, plain
from core.errors import UserError
from core.layer_shapes import layer_shapes
from core.load_model import add_lora, keep_in_main_memory, load_base, lora_settings
from training.experts import round_experts
from training.fused_layers import fuse_layers
from training.memory import adapted_in, estimate, free_memory, layer_bytes, saved_activations
from training.packed_attention import use_packed_attention
from training.packing import pack

EIGHT = 8 * 2**30


EXPERTS = "peft.target_parameters=[experts.gate_up_proj,experts.down_proj]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "words"),
    [
        *((family, [f"peft={peft}"]) for family in [*FAMILIES, *KINDS] for peft in ("lora", "qlora")),
        ("26b-a4b", [EXPERTS]),
        ("e2b", ["peft.target_modules=all-linear"]),
    ],
)
def test_parameters_are_counted_exactly(family: str, words: list[str], tmp_path: Path) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 256, "intermediate_size": 512}
    gemma = tiny_gemma4(family) if family in KINDS else tiny_gemma(family, **sizes)
    gemma.to(torch.bfloat16).save_pretrained(tmp_path)
    config = load_config(words)
    need = estimate(config, tmp_path, torch.bfloat16, tokens=1000, targets=500)
    settings = plain(config.peft)
    quantization = settings.pop("quantization")
    base = load_base(tmp_path, torch.bfloat16, quantization, torch.device("cpu"))
    weights = 0
    for parameter in base.parameters():
        weights += parameter.nbytes
        if state := getattr(parameter, "quant_state", None):
            weights += state.absmax.nbytes + state.state2.absmax.nbytes
    assert need.weights == pytest.approx(weights, rel=0.01)
    targets = ("r", "lora_alpha", "target_modules", "target_parameters")
    model = add_lora(base, {key: settings[key] for key in targets if key in settings})
    adapter = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert need.adapter == 2 * adapter and need.optimizer == 2 * adapter


@pytest.mark.parametrize("words", [[], ["peft.use_dora=true"], ["peft.lora_dropout=0.1"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_activations_of_a_layer_are_counted(family: str, words: list[str]) -> None:
    gemma = tiny_gemma(family, torch.bfloat16, vocab_size=1000, hidden_size=256, intermediate_size=512, head_dim=64)
    settings = plain(load_config(words).peft)
    model = add_lora(gemma, {key: settings[key] for key in ("r", "lora_dropout", "use_dora", "target_modules")})
    model.train()
    fuse_layers(model)
    use_packed_attention(gemma)
    torch.manual_seed(0)
    packed = pack(sorted([2, *torch.randint(3, 999, (300,)).tolist()] for _ in range(9)))
    tokens = packed.ids.numel()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def look(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights and tensor.numel() % tokens == 0:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        hidden = gemma.model(input_ids=packed.ids, position_ids=packed.layout.positions, layout=packed.layout)
    assert hidden.last_hidden_state.requires_grad
    adapted = [adapted_in(layer) for layer in gemma.model.layers]
    counted = tokens * sum(
        layer_bytes(shape, names, model.peft_config["default"], torch.bfloat16, fused=not words)
        for shape, names in zip(layer_shapes(gemma.config), adapted, strict=True)
    )
    # The more is where queries and keys are rotated without kernels of our own (no compiler).
    assert 0.92 < counted / sum(kept.values()) < 1.16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [*((kind, []) for kind in KINDS), ("26b-a4b", [EXPERTS]), ("e2b", ["peft.target_modules=all-linear"])],
)
def test_saved_activations_of_gemma_4_are_counted(kind: str, words: list[str]) -> None:
    """Of layers of two kinds together, with per-layer embeddings, and the experts' weights with their update."""
    gemma = tiny_gemma4(kind, torch.bfloat16)
    config = load_config(["peft.r=2", *words])
    model = add_lora(gemma, lora_settings(plain(config.peft))).train()
    gemma.config.use_cache = False
    fuse_layers(model)
    use_packed_attention(gemma)
    round_experts(gemma, gemma.device)
    packed = pack(sorted([2, *range(3 + n, 253 + n)] for n in range(9)))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def look(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        gemma.model(input_ids=packed.ids, position_ids=packed.layout.positions, layout=packed.layout)
    counted = saved_activations(config, model, torch.bfloat16, packed.ids.numel(), fused=True)
    # The less are the adapters' products, norms' scales and rotary embeddings, which are small but in a tiny model.
    assert 0.9 < counted / sum(kept.values()) < 1.02


def test_each_piece_of_advice_lowers_the_estimate(base_folder: Path) -> None:
    def total(*words: str, tokens: int = 4000) -> float:
        return estimate(load_config(words), base_folder, torch.bfloat16, tokens, tokens // 3).total

    assert total("peft=qlora") < total()
    assert total("task.train.gradient_checkpointing=true") < 0.6 * total()
    assert total(tokens=1000) < 0.6 * total()


def test_a_per_layer_table_in_main_memory_is_not_counted_on_a_gpu(tmp_path: Path) -> None:
    gemma = tiny_gemma4("e2b", torch.bfloat16)
    gemma.save_pretrained(tmp_path)
    words = ["trainer=gpu", "trainer.table_in_main_memory=true"]
    there, away = (estimate(load_config(words[:count]), tmp_path, torch.bfloat16, 100, 50) for count in (1, 2))
    assert there.weights - away.weights == gemma.model.embed_tokens_per_layer.weight.nbytes > 0
    tiny_gemma4("31b").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="table_in_main_memory=true: this model has no table"):
        estimate(load_config(words), tmp_path, torch.bfloat16, 100, 50)


def test_a_per_layer_table_in_main_memory_stays_there_and_gives_the_same_rows() -> None:
    gemma, ids = tiny_gemma4("e2b"), torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = gemma(ids).logits
        keep_in_main_memory(gemma)
        assert torch.equal(gemma(ids).logits, expected)
    gemma.to("meta")  # as to a GPU
    stays = {name for name, parameter in gemma.named_parameters() if parameter.device.type == "cpu"}
    assert stays == {"model.embed_tokens_per_layer.weight"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, EIGHT),
        ({"memory.max": "max", "memory.current": "1000"}, EIGHT),
        ({"memory.max": "5000000", "memory.current": "1000000"}, 4_000_000),
        ({"memory/memory.limit_in_bytes": "5000000", "memory/memory.usage_in_bytes": "1000000"}, 4_000_000),
        ({"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1000000"}, EIGHT),
    ],
)
def test_free_memory_is_the_smaller_of_machine_and_control_group(
    files: dict[str, str], free: int, tmp_path: Path
) -> None:
    held = 1024 * 1024
    for name, text in {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {EIGHT // 1024} kB\n",
        "proc/self/status": "VmRSS:\t1024 kB\n",
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory("cpu", tmp_path) == free + held


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "commands.train",
            f"data_dir={folder}/data",
            f"runs_dir={folder}/runs",
            "task.train.epochs=1",
            "task.generate.max_new_tokens=4",
            *words,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_run_that_does_not_fit_in_memory_is_refused_with_advice(tiny_base: Path, tmp_path: Path) -> None:
    result = run(tmp_path, f"model.path={tiny_base}", "peft.r=16000000")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "training would need" in result.stderr and "are free" in result.stderr
    for advice in ("PEFT=qlora", "task.train.gradient_checkpointing=true", "trainer.micro_batch_tokens="):
        assert advice in result.stderr
    assert "Asking the base model" not in result.stdout


@pytest.mark.slow
@needs_task("squid_game")
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(base_folder: Path, tmp_path: Path) -> None:
    """Of packs that differ in length: freed memory is then in pieces that do not fit the next."""
    with (tmp_path / "rows.csv").open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(("slang", "description"))
        for n in range(20):  # a term each that is like no other's, and from 1 to 100 words
            words = (hashlib.sha256(f"{n} {word}".encode()).hexdigest()[:4] for word in range(1 + n * 37 % 100))
            rows.writerow((f"term {hashlib.sha256(str(n).encode()).hexdigest()[:8]}", " ".join(words)))
    words = (f"task.data.source={tmp_path}/rows.csv", "task.train.batch_size=6")
    result = run(tmp_path, f"model.path={base_folder}", *words)
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("runs/slang/*/evaluation.json")
    figures = json.loads(file.read_text())
    assert figures["memory_estimate_gib"] == pytest.approx(figures["peak_memory_gib"], rel=0.2)
