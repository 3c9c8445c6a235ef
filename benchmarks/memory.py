"""What training says that it will need, beside what it then takes.

    python -m benchmarks.memory                       (about 20 minutes on two cores)
    python -m benchmarks.memory runs=slang,rank-64

Every run is `python -m commands.train` on samples of this repository, shortened to one epoch and short answers: memory
stops growing within its steps. Writes docs/memory.md.
"""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from core.artifacts import Evaluation
from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import UserError, run
from core.files import write_whole
from core.machine import describe_environment

DOCS = Path("docs/memory.md")
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
SHORT = ["task.train.epochs=1", "task.generate.max_new_tokens=8", "task.evaluate.questions=[]"]
HEADER = """# Memory of training

`{command}` on {machine}, {date}: what `make train` says before it starts, and the most that the
process then held (`VmHWM`, or the GPU's reserved memory). Base: {model}.

| run | words | expected, GiB | measured, GiB | expected / measured |
|---|---|---|---|---|
"""


def main(words: list[str]) -> None:
    chosen = list(RUNS)
    for word in words:
        name, _, value = word.partition("=")
        if name != "runs" or (unknown := [one for one in value.split(",") if one not in RUNS]):
            raise UserError(
                f"{word}: {', '.join(unknown) if name == 'runs' else name} is unknown. Known: runs={','.join(RUNS)}"
            )
        chosen = value.split(",")
    model = load_config([]).model
    ensure_base_model(model)
    table = []
    with tempfile.TemporaryDirectory(prefix="memory-") as scratch:
        for name in chosen:
            expected, measured = measure(name, Path(scratch) / name)
            print(f"{name}: {expected:.2f} GiB expected, {measured:.2f} measured", flush=True)
            table.append(
                f"| {name} | {' '.join(RUNS[name])} | {expected:.2f} | {measured:.2f} | {expected / measured:.2f} |\n"
            )
    environment = describe_environment()
    machine = environment.gpus[0] if environment.gpus else f"{environment.cpu}, {environment.cores} cores"
    command = " ".join(["python -m benchmarks.memory", *words])
    text = HEADER.format(command=command, machine=machine, date=datetime.now(UTC).date(), model=model.name)
    write_whole(DOCS, text + "".join(table))
    print(f"written: {DOCS}")


def measure(name: str, folder: Path) -> tuple[float, float]:
    """Memory in GiB that a run of `name` says it will need, and that it took."""
    folder.mkdir()
    words = [*RUNS[name], *SHORT, f"data_dir={folder}/data", f"runs_dir={folder}/runs"]
    if name == "long-rows":
        words.append(f"task.data.source={long_dialogues(folder / 'long.jsonl')}")
    result = subprocess.run(
        [sys.executable, "-m", "commands.train", *words], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise UserError(f"{name}: training failed: {result.stderr.strip()[-2000:]}")
    (file,) = folder.glob("runs/*/*/evaluation.json")
    evaluation = Evaluation.read(file)
    assert evaluation.memory_estimate_gib and evaluation.peak_memory_gib
    return evaluation.memory_estimate_gib, evaluation.peak_memory_gib


def long_dialogues(file: Path) -> Path:
    """The sample's dialogues, five at a time made one: rows of some 800 to 2,000 tokens."""
    dialogues = [json.loads(line)["messages"] for line in CHAT.read_text().splitlines()]
    dialogues = [messages for messages in dialogues if messages[0]["role"] == "user"]
    joined = (chain.from_iterable(dialogues[first : first + 5]) for first in range(0, len(dialogues), 5))
    file.write_text("".join(json.dumps({"messages": list(messages)}) + "\n" for messages in joined))
    return file


if __name__ == "__main__":
    run(main)
