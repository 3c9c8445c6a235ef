"""The memory that training estimates, compared with the memory that it takes.

    python -m benchmarks.memory                       (about 20 minutes on two cores)
    python -m benchmarks.memory runs=slang,rank-64

Every run is `python -m commands.train` on samples of this repository, shortened to one epoch and short answers: memory
stops growing within its steps. Writes benchmarks/results/memory.json (of the default model), memory-gemma-4.json
(of random models, smaller than the published ones and of their kinds) and the tables in docs/memory.md. After each run,
what there is so far is in <…>.partial.json, which an interrupted benchmark leaves and no page shows.
"""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.figures import RESULTS, partial_file, refresh
from benchmarks.random_base import random_base
from core.arguments import Arguments, parse
from core.artifacts import Evaluation
from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import UserError, run
from core.files import write_json
from core.machine import describe_environment

CHAT = Path("tasks/chat/chat.jsonl")
RUNS = {
    "slang": [],
    "squid_game": ["task=squid_game"],
    "chat": ["task=chat"],
    "qlora": ["peft=qlora"],
    "checkpointing": ["task.train.gradient_checkpointing=true", "task.train.batch_size=64"],
    "dora": ["peft.use_dora=true"],
    "rank-64": ["peft.r=64"],
    "full-micro-batches": ["task.train.batch_size=64"],
    "long-rows": ["task=chat", "task.train.max_length=2048", "task.train.batch_size=4"],
}
# Random models of every kind of layer in Gemma 4: the mechanisms and the vocabulary of the published sizes, 0.2 to 0.3
# billion weights.
PATTERN = ["sliding_attention"] * 4 + ["full_attention"]
MID_SIZE: dict[str, tuple[str, dict[str, Any]]] = {
    "tables": (
        "gemma-4-e2b",
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 10,
            "layer_types": PATTERN * 2,
            "num_kv_shared_layers": 5,
            "head_dim": 64,
            "global_head_dim": 128,
            "hidden_size_per_layer_input": 32,
        },
    ),
    "experts": (
        "gemma-4-26b-a4b",
        {
            "hidden_size": 512,
            "intermediate_size": 512,
            "num_hidden_layers": 10,
            "layer_types": PATTERN * 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "global_head_dim": 128,
            "num_experts": 32,
            "top_k_experts": 4,
            "moe_intermediate_size": 192,
        },
    ),
    "dense": (
        "gemma-4-31b",
        {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 15,
            "layer_types": PATTERN * 3,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "global_head_dim": 128,
        },
    ),
}
EXPERTS = "peft.target_parameters=[experts.gate_up_proj,experts.down_proj]"
RUNS |= {  # name → overrides; the first word is of MID_SIZE
    "tables": [],
    "tables-qlora": ["peft=qlora"],
    "tables-checkpointing": ["task.train.gradient_checkpointing=true", "task.train.batch_size=64"],
    "experts": [],
    "experts-adapted": [EXPERTS],
    "experts-qlora": ["peft=qlora"],
    "dense": [],
    "dense-long-rows": ["task=chat", "task.train.max_length=2048", "task.train.batch_size=4"],
}
FEW = ["task.data.train_rows=128"]
SHORT = ["task.train.epochs=1", "task.generate.max_new_tokens=8", "task.evaluate.questions=[]"]


class Options(Arguments):
    runs: list[Literal[tuple(RUNS)]] = Field(list(RUNS), description="those to measure")  # type: ignore[valid-type]
    minutes: float = Field(10, gt=0, description="of each, after which it is stopped and left out")


def main(argv: list[str]) -> None:
    options = parse(Options, argv)
    model = load_config([]).model
    tokenizer = ensure_base_model(model)
    rows: list[dict[str, Any]] = []
    lacking = dict.fromkeys(options.runs, "not measured yet")

    def keep(partly: bool) -> None:
        for file, those, known in (
            ("memory.json", [row for row in rows if row["of"] == model.name], lambda name: not _kind(name)),
            ("memory-gemma-4.json", [row for row in rows if row["of"] != model.name], _kind),
        ):
            if those:
                result = {
                    "command": " ".join(["python -m benchmarks.memory", *argv]),
                    "machine": describe_environment().machine,
                    "finished": f"{datetime.now(UTC):%Y-%m-%d}",
                    "rows": those,
                    "left_out": [f"{name}: {why}" for name, why in lacking.items() if known(name)],
                }
                write_json(partial_file(RESULTS / file), result)
                if not partly:
                    print(f"written: {partial_file(RESULTS / file).replace(RESULTS / file)}")

    with tempfile.TemporaryDirectory(prefix="memory-") as scratch:
        for name in options.runs:
            base = random_model(name, tokenizer, Path(scratch))
            try:
                expected, measured = measure(name, Path(scratch) / name, base, options.minutes * 60)
            except subprocess.TimeoutExpired:
                lacking[name] = f"not done in {options.minutes:g} minutes"
                print(f"{name}: {lacking[name]}", flush=True)
                continue
            del lacking[name]
            print(f"{name}: {expected:.2f} GiB expected, {measured:.2f} measured", flush=True)
            overrides = RUNS[name]
            of = MID_SIZE[_kind(name)][0] if base else model.name
            rows.append(
                {"run": name, "of": of, "overrides": overrides, "expected_gib": expected, "measured_gib": measured}
            )
            keep(partly=True)
    keep(partly=False)
    print(f"written: {', '.join(refresh())}")


def _kind(name: str) -> str:
    """The key of MID_SIZE that the run `name` is of; "" for a run of the default model."""
    kind = name.partition("-")[0]
    return kind if kind in MID_SIZE else ""


def random_model(name: str, tokenizer: Path, folder: Path) -> Path | None:
    """The random model of the run `name`, in `folder`; or None for a run of the default model."""
    if not (kind := _kind(name)):
        return None
    architecture, changes = MID_SIZE[kind]
    return random_base(architecture, tokenizer, folder, **changes)


def measure(name: str, folder: Path, base: Path | None, seconds: float) -> tuple[float, float]:
    """The estimated and the measured peak memory of the run `name` on `base`, in GiB.

    Raises:
        subprocess.TimeoutExpired: it took more than `seconds`, and was stopped.
    """
    folder.mkdir()
    overrides = [*RUNS[name], *SHORT, *(FEW if base else []), f"data_dir={folder}/data", f"runs_dir={folder}/runs"]
    if base:
        overrides.append(f"model.path={base}")
    if name.endswith("long-rows"):
        overrides.append(f"task.data.source={long_dialogues(folder / 'long.jsonl')}")
    command = [sys.executable, "-m", "commands.train", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    if result.returncode:
        raise UserError(f"{name}: training failed: {result.stderr.strip()[-2000:]}")
    (file,) = folder.glob("runs/*/*/evaluation.json")
    evaluation = Evaluation.read(file)
    assert evaluation.memory_estimate_gib and evaluation.peak_memory_gib
    return evaluation.memory_estimate_gib, evaluation.peak_memory_gib


def long_dialogues(file: Path) -> Path:
    """The shipped dialogues, joined five at a time to samples of about 800 to 2,000 tokens."""
    dialogues = [json.loads(line)["messages"] for line in CHAT.read_text().splitlines()]
    dialogues = [messages for messages in dialogues if messages[0]["role"] == "user"]
    joined = (chain.from_iterable(dialogues[first : first + 5]) for first in range(0, len(dialogues), 5))
    file.write_text("".join(json.dumps({"messages": list(messages)}) + "\n" for messages in joined))
    return file


if __name__ == "__main__":
    run(main)
