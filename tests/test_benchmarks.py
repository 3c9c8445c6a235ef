"""The benchmark gives every system the same work and tells their results apart."""

import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ROOT, TINY, TINY_FAMILY, tiny_gemma
from launcher import ENVIRONMENT
from peft import LoraConfig, get_peft_model
from tiny_gemma4 import KINDS, SMALL, tiny_gemma4
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks import figures
from benchmarks.convert import measured
from benchmarks.random_base import ARCHITECTURES
from benchmarks.samples import chunks
from benchmarks.serve import left_out as rounds_left_out
from benchmarks.serve import random_model, read_prompts
from benchmarks.systems import Job
from benchmarks.train import Evaluator, left_out, main, run_rounds
from benchmarks.worker import Shares
from core import machine
from core.c_build import processor_flags
from core.layer_shapes import layer_shapes
from serving.engine.adapters import read_adapter
from serving.engine.architecture import GemmaConfig
from training.flops import flops_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "target_modules": TARGETS}


def benchmark(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.train", f"task.data.source={ROOT}/tasks/slang/slang.csv", *words]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_equal_those_that_torch_counts(family: str) -> None:
    """In a plain step over one row: attention there is of all pairs, and the first layer's inputs get no gradient."""
    length = 48  # longer than the window
    model = get_peft_model(tiny_gemma(family, attn_implementation="eager"), LoraConfig(**LORA))
    model.train()
    ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    flops = flops_of(model.config, [length], length, LORA["r"], TARGETS)
    width = TINY["num_attention_heads"] * TINY["head_dim"]
    attention_of_all_pairs = 12 * length**2 * width * TINY["num_hidden_layers"]
    keys = 2 * TINY["num_key_value_heads"] * TINY["head_dim"]
    not_needed = 2 * length * (TINY["hidden_size"] * (width + keys) + 3 * LORA["r"] * TINY["hidden_size"])
    # Rotary embeddings' outer products are the small rest.
    assert counter.get_total_flops() == pytest.approx(
        flops.layers + flops.adapters + flops.output + attention_of_all_pairs - not_needed, rel=1e-4
    )
    windows = {"gemma": 0, "gemma2": 2, "gemma3_text": 2}[family]
    full, seen = length * (length + 1) // 2, sum(min(at + 1, TINY["sliding_window"]) for at in range(length))
    assert flops.attention == 12 * width * (windows * seen + (3 - windows) * full)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_gemma_4_equal_those_that_torch_counts(kind: str) -> None:
    """Layers of two kinds, borrowed keys, keys as values, per-layer embeddings, and of experts the active ones."""
    length = 48  # longer than the window
    base = tiny_gemma4(kind)
    base.set_attn_implementation("eager")
    if kind == "26b-a4b":
        base.set_experts_implementation("eager")  # torch does not count grouped products
    model = get_peft_model(base, LoraConfig(**LORA)).train()
    ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    flops = flops_of(model.config, [length], length, LORA["r"], TARGETS)
    layers = layer_shapes(model.config)
    attention_of_all_pairs = 12 * length**2 * sum(layer.heads * layer.head_dim for layer in layers)
    first = [size for name, size in layers[0].linear().items() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    not_needed = 2 * length * sum(inputs * outputs + LORA["r"] * inputs for inputs, outputs in first)
    assert counter.get_total_flops() == pytest.approx(
        flops.layers + flops.adapters + flops.output + attention_of_all_pairs - not_needed, rel=1e-4
    )


def test_a_confined_machine_is_named_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.AVX2:
        monkeypatch.delenv(name, raising=False)
    free = machine.short_machine_name()
    monkeypatch.setattr(machine, "processor_flags", lambda: "flags : fma avx2 avx512f")
    monkeypatch.setenv("KERNEL_CFLAGS", "-O1")
    assert machine.short_machine_name() == f"{free}, with KERNEL_CFLAGS=-O1"
    for name, value in machine.AVX2.items():
        monkeypatch.setenv(name, value)
    assert machine.short_machine_name() == f"{free}, confined to AVX2"
    assert machine.describe_environment().machine.endswith(" cores, confined to AVX2")
    monkeypatch.setattr(machine, "processor_flags", lambda: "flags : fma avx2")
    assert machine.short_machine_name() == free  # it has no more than AVX2


@pytest.mark.skipif("avx2" not in processor_flags().split(), reason="this processor has no AVX2")
@pytest.mark.slow
def test_torch_confined_to_avx2_computes_as_there() -> None:
    """In a process of its own, where nothing has computed yet."""
    program = """
import torch
from core.machine import confine_to_avx2
confine_to_avx2()
from training.gemma_lora import weights_dtype
assert weights_dtype() == torch.float32
print(torch.__config__.show())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "CPU capability usage: AVX2" in done.stdout


def test_chunks_have_one_length_and_the_fraction_of_target_tokens_of_the_rows() -> None:
    rows = [{"input_ids": [2, *range(10 * n, 10 * n + 9)], "target_ranges": [[6, 10]]} for n in range(1, 30)]
    cut = chunks(rows, 32)
    assert {len(row["input_ids"]) for row in cut} == {32} and len(cut) == 29 * 9 // 31
    assert all(row["input_ids"][0] == 2 and row["target_ranges"] == [[round(32 * 0.6), 32]] for row in cut)
    stream = [token for row in rows for token in row["input_ids"][1:]]
    assert [token for row in cut for token in row["input_ids"][1:]] == stream[: len(cut) * 31]
    assert chunks(rows, 1000) == []


@pytest.mark.slow
def test_equivalent_systems_get_the_same_tokens_and_reach_the_same_loss(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This project and Hugging Face's Trainer in float32: same tokens, same loss, though cut otherwise."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(24):
        length = int(torch.randint(8, 60, (), generator=generator))
        ids = [2, *torch.randint(3, 40, (length - 1,), generator=generator).tolist()]
        rows.append(
            {"input_ids": ids, "target_ranges": [[int(torch.randint(1, length, (), generator=generator)), length]]}
        )
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    base = tmp_path / "base"  # as it is on disk, float32 for both
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).save_pretrained(base)
    for file in tiny_base.glob("tokenizer*"):
        (base / file.name).write_bytes(file.read_bytes())
    evaluator = Evaluator(base, LORA, rows, 1024)
    before = evaluator.begin(0, tmp_path / "initial.safetensors")
    jobs = {
        name: Job(
            base_folder=str(base),
            dtype="float32",
            lora=LORA,
            initial=str(tmp_path / "initial.safetensors"),
            samples=str(tmp_path / "rows.json"),
            steps=[1, 1, 1],
            batch=8,
            micro_batch=4,
            micro_batch_tokens=128,
            pack_tokens=64,
            learning_rate=1e-2,
            weight_decay=0.01,
            clip=1.0,
            seed=0,
            prompt={"template": "{instruction}{response}", "instruction": "", "response": ""},
            recipe="",
            adapter=str(tmp_path / f"{name}.safetensors"),
        )
        for name in ("ours", "hf-fp32", "litgpt")
    }
    kept: list[dict[str, dict[str, Any]]] = []
    found = run_rounds(jobs, tmp_path, 600, kept.append)
    assert "Gemma 3 270M" in found["litgpt"]["not_run"]
    assert left_out(kept[0], 2) == [f"{name}: 1 of 2 rounds and the held-out loss" for name in ("ours", "hf-fp32")]
    assert len(kept) == 2 and kept[1] == found
    seen = {name: [(one["tokens"], one["learned"]) for one in found[name]["rounds"]] for name in ("ours", "hf-fp32")}
    assert seen["ours"] == seen["hf-fp32"] and len(seen["ours"]) == 2
    assert seen["ours"][1][0] == sum(len(row["input_ids"]) for row in rows[16:])
    after = {name: evaluator.loss(tmp_path / f"{name}.safetensors") for name in seen}
    assert after["ours"] < before - 0.05
    assert after["ours"] == pytest.approx(after["hf-fp32"], abs=2e-3)
    assert all(0.1 < found[name]["peak_gib"] < 8 for name in seen)


def test_a_conversion_that_takes_too_long_is_stopped() -> None:
    assert measured(["sleep", "600"], 0.05) is None
    took = measured([sys.executable, "-c", "x = bytearray(50 << 20)"], 600)
    assert took and took[2] > 0.04  # GiB; Linux counts what this process held when it started the other, too


def test_a_share_that_is_not_used_is_for_the_others() -> None:
    shares = Shares(["a", "b", "c", "d"], 100)
    assert shares.left("a") == 25
    shares.used |= {"a": 5, "b": 20}
    shares.out.add("a")
    assert shares.left("b") == pytest.approx(95 / 3 - 20) and shares.left("c") == pytest.approx(95 / 3)


def test_rounds_that_serving_lacks_are_said() -> None:
    rounds = [[[0.1, 0.2], [0.1, 0.3]]]
    systems = {
        "ours": {"arrivals": {1: rounds * 3, 8: rounds * 3}},
        "vllm": {"arrivals": {1: rounds * 2, 8: rounds}, "stopped": " (it did not end within 9 s)"},
        "llama.cpp": {"not_run": "xllamacpp is not installed"},
    }
    assert rounds_left_out(systems, 3) == [
        "vllm: of 3 rounds 1 with 1 at once, 2 with 8 at once (it did not end within 9 s)"
    ]


def test_a_result_with_more_systems_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "result.json"
    file.write_text('{"systems": {"ours": {}, "hf-fp32": {}}}')
    figures.partial_file(file).write_text('{"systems": {"ours": {}}}')
    assert "has hf-fp32 too and stays as it is" in figures.publish(file)
    assert set(json.loads(file.read_text())["systems"]) == {"ours", "hf-fp32"}
    figures.partial_file(file).write_text('{"systems": {"ours": {}, "hf-fp32": {}, "litgpt": {}}}')
    assert figures.publish(file).startswith("written: ") and "litgpt" in file.read_text()


@pytest.mark.slow
def test_a_system_that_has_used_its_share_of_the_time_is_stopped(tmp_path: Path) -> None:
    """A millisecond for two systems: neither has started by then."""
    job = Job(**{field.name: "" for field in fields(Job)} | {"steps": [1, 1]})  # type: ignore[arg-type]
    found = run_rounds({"ours": job, "hf-fp32": job}, tmp_path, 1e-3)
    assert all(system["not_run"] == "did not end within 0 s" for system in found.values())
    assert left_out({"ours": {"rounds": [{}], "stopped": " (it has no time left for another round)"}}, 3) == [
        "ours: 2 of 3 rounds and the held-out loss (it has no time left for another round)"
    ]


@pytest.mark.slow
def test_the_command_writes_one_table_of_its_measurements(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/benchmarks.md").write_text("<!--figure training-speed-->\n<!--/figure-->\n")
    words = [
        f"model.path={tiny_base}",
        "systems=hf-fp32,hf-bf16-weights,litgpt",
        "rows=16",
        "rounds=2",
        "warmup=1",
        "length=64",
        "task.train.learning_rate=1e-3",
    ]
    result = benchmark(tmp_path, *words)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "benchmarks/results/training").glob("*.json")
    found = json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text() and "source=slang.csv" in found["command"]
    assert found["systems"]["litgpt"]["not_run"]
    assert (
        found["data"]["tokens"]
        == 64 * found["data"]["rows"]
        == sum(one["tokens"] for one in found["systems"]["hf-fp32"]["rounds"])
    )
    assert len(found["systems"]["hf-bf16-weights"]["rounds"]) == 2
    assert found["versions"]["hf-fp32"]["torch"] == torch.__version__
    assert found["left_out"] == []  # and the partial file is gone
    text = (tmp_path / "docs/benchmarks.md").read_text()
    assert text.count("\n## ") == 1 and "| litgpt | not run: " in text
    assert f"| {found['systems']['hf-fp32']['tokens_per_second']:,.0f} |" in text
    assert figures.refresh() == []  # again: its section is replaced, not added
    assert (tmp_path / "docs/benchmarks.png").stat().st_size > 1000


@pytest.mark.slow
def test_an_architecture_with_random_weights_is_measured_like_a_base(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `random=gemma-2-2b length=4096` does on a GPU, with an architecture that a test can train."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/benchmarks.md").write_text("<!--figure training-speed-->\n<!--/figure-->\n")
    sizes = {name: size for name, size in TINY.items() if not name.endswith("token_id")}
    monkeypatch.setitem(ARCHITECTURES, "tiny", ("gemma2", {**sizes, **TINY_FAMILY["gemma2"], "vocab_size": 500}))
    words = [
        f"task.data.source={ROOT}/tasks/slang/slang.csv",
        f"model.path={tiny_base}",
        "random=tiny",
        f"model.models_dir={tmp_path}",
        "systems=ours,hf-bf16-weights",
        "rows=16",
        "rounds=1",
        "warmup=1",
        "length=64",
    ]
    main(words)
    (file,) = (tmp_path / "benchmarks/results/training").glob("*tiny*.json")
    found = json.loads(file.read_text())
    assert found["model"] == "tiny (random weights)" and found["data"]["tokens"] == 64 * found["data"]["rows"]
    assert all(len(system["rounds"]) == 1 for system in found["systems"].values())
    assert found["held_out_loss_before"] == pytest.approx(math.log(500), abs=1)  # it has not learned anything
    text = (tmp_path / "docs/benchmarks.md").read_text()
    assert "This project's memory estimate" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("systems=ours,hf", "systems=hf is unknown. Known: ours, hf-fp32"),
        ("rows=few", "rows must be a whole number, not 'few'"),
        ("random=gemma-9", "random=gemma-9 is unknown. Known: gemma-2b"),
    ],
)
def test_an_invalid_argument_gives_one_sentence(word: str, says: str, tiny_base: Path, tmp_path: Path) -> None:
    result = benchmark(tmp_path, f"model.path={tiny_base}", word)
    assert result.returncode == 2
    assert says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(("layers", "borrowing"), [(10, 5), (8, 3), (5, 0)])
def test_what_is_served_at_random_is_a_published_shape_cut_short(
    layers: int, borrowing: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shape = {name: value for name, value in SMALL.items() if not name.endswith("token_id")}
    monkeypatch.setitem(ARCHITECTURES, "tiny", ("gemma4_text", shape))
    base, adapter = random_model("tiny", layers, tmp_path / "none", tmp_path)
    config = GemmaConfig.read(base)
    assert config.layers == layers
    assert sum(shape.kv_source != number for number, shape in enumerate(config.shapes)) == borrowing
    assert len(read_adapter(adapter, config).lora_a) == 7 * layers - 2 * borrowing
    assert "Instruction:" in read_prompts(adapter, 1)[0]
