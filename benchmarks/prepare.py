"""How fast `make data` is and how much memory it holds: this version beside an earlier one, on the same rows.

    python -m benchmarks.prepare                                  (500,000 rows and half as many)
    python -m benchmarks.prepare rows=5000000 minutes=30
    python -m benchmarks.prepare against=                         (this version alone)

The rows are questions with answers of made-up words, in shards of JSON Lines: each hundred has two that repeat another
one and two in which one word of another is replaced. The earlier version, a commit that is checked out beside this one,
reads the same rows in one file, as it knows no shards. Memory is what a process and those that it started hold
themselves (anonymous pages), its largest sum over a run; pages of files belong to the system's cache.

Writes benchmarks/results/prepare.json.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.figures import RESULTS
from core.arguments import Arguments, parse
from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import UserError, run
from core.files import write_json
from core.machine import cores, short_machine_name
from core.tasks import ROOT

BEFORE = "b72112b"  # the last version that prepared data with one process
SHARDS = 16
WORDS = 20_000
TASK = """
name: pairs
data:
  source: pairs.jsonl
  columns: { question: [question], answer: [answer] }
  required: [question, answer]
  key: question
prompt: { instruction: "{question}", response: "{answer}" }
"""


class Options(Arguments):
    rows: int = Field(500_000, ge=1000, description="rows of the larger table; the other has half as many")
    against: str = Field(BEFORE, description="commit of the version to compare with; empty: none")
    minutes: float = Field(20, gt=0, description="of each run, after which it is stopped and left out")


def main(argv: list[str]) -> None:
    options = parse(Options, argv)
    ensure_base_model(load_config().model)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="prepare-") as scratch:
        folder = Path(scratch)
        (folder / "tasks").mkdir()
        (folder / "nemo_configs/task").mkdir(parents=True)
        (folder / "nemo_configs/task/pairs.yaml").write_text(TASK)
        versions = {"ours": ROOT} | ({"before": _checkout(options.against, folder)} if options.against else {})
        try:
            for rows in (options.rows // 2, options.rows):
                write_rows(folder / "shards", folder / "pairs.jsonl", rows)
                for version, root in versions.items():
                    source = folder / ("shards" if version == "ours" else "pairs.jsonl")
                    measured = measure(root, source, folder, options.minutes * 60)
                    if measured:
                        found.append({"version": version, "rows": rows, **measured})
                        print(found[-1], flush=True)
        finally:
            if options.against:
                _git("worktree", "remove", "--force", str(versions["before"]))
    write_json(
        RESULTS / "prepare.json",
        {
            "command": " ".join(["python -m benchmarks.prepare", *argv]),
            "machine": short_machine_name(),
            "cores": cores(),
            "before": options.against or None,
            "runs": found,
        },
    )


def write_rows(shards: Path, whole: Path, rows: int) -> None:
    """The same rows as `SHARDS` files in the folder `shards`, and as one file."""
    shards.mkdir(exist_ok=True)
    files = [shards / f"part-{number:05}.jsonl" for number in range(SHARDS)]
    with whole.open("w", encoding="utf-8") as out:
        made = made_rows(rows)
        for number, file in enumerate(files):
            with file.open("w", encoding="utf-8") as shard:
                for row in range(rows * number // SHARDS, rows * (number + 1) // SHARDS):
                    line = json.dumps(next(made), ensure_ascii=False) + "\n"
                    shard.write(line)
                    out.write(line)
                    del row


def made_rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """`count` rows, the same for the same seed."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("aeinorstlcdu", k=chance.randint(2, 10))) for _ in range(WORDS)]
    recent = list[tuple[list[str], list[str]]]()

    def text(shortest: int, longest: int) -> list[str]:
        # The square makes some words far more frequent than others, as in a language.
        return [words[int(WORDS * chance.random() ** 2)] for _ in range(chance.randint(shortest, longest))]

    for number in range(count):
        kind = number % 100
        if recent and kind in (20, 70):
            asked, answer = chance.choice(recent)
        elif recent and kind in (45, 95):
            asked, answer = chance.choice(recent)
            answer = [*answer]
            answer[chance.randrange(len(answer))] = chance.choice(words)
            asked = [*asked[:-1], chance.choice(words)]
        else:
            asked, answer = text(6, 16), text(10, 40)
        recent = [*recent[-200:], (asked, answer)]
        yield {"question": f"{' '.join(asked).capitalize()}?", "answer": f"{' '.join(answer).capitalize()}."}


def measure(root: Path, source: Path, folder: Path, limit: float) -> dict[str, Any] | None:
    """Prepare `source` with the version in `root`; None where that took longer than `limit` seconds.

    Raises:
        UserError: it failed.
    """
    words = ["task=pairs", f"task.data.source={source}", f"data_dir={folder}/data-{root.name}", "examples=0"]
    words += [f"model.models_dir={ROOT / 'models'}", "trainer=cpu", "task.data.split.seed=1"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "commands.data", *words],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        peak = max(peak, held(process.pid))
        if time.monotonic() - began > limit:
            process.kill()
            process.wait()
            return None
        time.sleep(0.1)
    if process.returncode:
        raise UserError(f"commands.data of {root} failed: {process.stderr.read() if process.stderr else ''}")
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    manifest = json.loads((folder / f"data-{root.name}/manifest.json").read_text())
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(used, 1),
        "peak_mib": round(peak / 2**20),
        "rows_per_second": round(manifest["rows_in"] / seconds),
        "rows_out": manifest["rows_out"],
    }


def held(pid: int) -> int:
    """Bytes of anonymous memory of a process and of all that it has started."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += held(int(child))
    except (OSError, ValueError):  # it has ended meanwhile
        pass
    return total


def _checkout(commit: str, folder: Path) -> Path:
    place = folder / "before"
    _git("worktree", "add", "--detach", str(place), commit)
    return place


def _git(*words: str) -> None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git {' '.join(words)} failed: {done.stderr.strip()}")


if __name__ == "__main__":
    run(main)
