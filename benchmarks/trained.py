"""Runs beside each other: each is trained, asked and measured as by `make train` and `make report`; one table of all.

They lie in build/, apart from the runs of the user. What is finished is not done again and a training that was stopped
goes on, so an interrupted command may be given again. Only the first run asks the base model.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.figures import RESULTS, partial_file, publish
from core.artifacts import Generation, Metrics
from core.base_model import ensure_base_model
from core.configuration import load_config, plain
from core.errors import UserError
from core.files import write_json, write_whole
from core.run_folder import Run
from core.schema import Config
from data_prep.data_folder import read_manifest
from data_prep.prepare import prepare
from evaluation.compare_runs import answers, behind, facts
from evaluation.generations import FILE
from training.fingerprint import name_run, run_fingerprint

SCRATCH = Path("build")
SAMPLES = 3  # questions whose answers are kept for the page
BASE = "base model"


def measure(kind: str, runs: Mapping[str, Sequence[str]], argv: Sequence[str]) -> None:
    """Train `runs`, name → overrides, and make benchmarks/results/<kind>.json and its page of them.

    Args:
        argv: of the command, to record.

    Raises:
        UserError: an override is wrong, which is said before anything is trained; or see `trained`.
    """
    for overrides in runs.values():
        load_config(overrides)
    command = shlex.join(["python", "-m", f"benchmarks.{kind}", *map(_without_folder, argv)])
    file, began = RESULTS / f"{kind}.json", time.monotonic()
    found: dict[str, Run] = {}
    for number, (name, overrides) in enumerate(runs.items(), 1):
        minutes = (time.monotonic() - began) / 60
        print(f"\n--- {name}: run {number} of {len(runs)}, after {minutes:.1f} minutes", flush=True)
        found[name] = trained(overrides, SCRATCH / kind / name, next(iter(found.values()), None))
        write_json(partial_file(file), {"command": command, **summary(found)})
    print(f"\n{publish(file)}")


def trained(overrides: Sequence[str], folder: Path, sibling: Run | None = None) -> Run:
    """The finished run of `overrides`, with the metrics of its answers.

    Args:
        folder: for its data and its run.
        sibling: a run that differs only in how it was trained; what the base model came to there holds here too.

    Raises:
        UserError: it did not end well, or has other held-out rows than its sibling.
    """
    words = [*overrides, f"data_dir={folder}/data", f"runs_dir={folder}/runs"]
    config = load_config(words)
    base_folder = ensure_base_model(config.model)
    data_folder = prepare(config, base_folder / "tokenizer.json")
    run_folder = name_run(config, base_folder, run_fingerprint(config, base_folder, data_folder))
    if sibling:
        _share_base(sibling, run_folder, data_folder)
    if not _is_measured(run_folder, config):
        for command in (["commands.train", *words], ["commands.report", *words, f"run={run_folder}"]):
            code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
            if code:
                raise UserError(
                    f"{folder.name}: {command[0]} ended with exit code {code}. Give the same command again to go on"
                )
    return Run.read(run_folder)


def _is_measured(run_folder: Path, config: Config) -> bool:
    metrics = Metrics.read_if_there(run_folder / "metrics.json")
    return metrics is not None and (metrics.sampling, metrics.settings) == (
        plain(config.task.generate),
        plain(config.task.evaluate),
    )


def _share_base(sibling: Run, run_folder: Path, data_folder: Path) -> None:
    assert sibling.manifest  # training writes it
    if sibling.manifest.splits["test"].sha256 != read_manifest(data_folder).splits["test"].sha256:
        raise UserError(f"{run_folder} would be measured on other held-out rows than {sibling.folder}")
    run_folder.mkdir(parents=True, exist_ok=True)
    if not (run_folder / "before.json").exists():
        write_whole(run_folder / "before.json", (sibling.folder / "before.json").read_bytes())
    if not (run_folder / FILE).exists():
        lines = Generation.read_lines(sibling.folder / FILE)
        write_whole(run_folder / FILE, "".join(one.to_line() for one in lines if one.side == "before"))


def summary(found: Mapping[str, Run]) -> dict[str, Any]:
    """What benchmarks/figures.py shows of runs that were measured on the same held-out rows."""
    first, best = next(iter(found.values())), min(found.values(), key=lambda one: one.evaluation.after.loss)
    environment, before, manifest = first.environment, first.evaluation.before, first.manifest
    assert environment and manifest  # training writes them
    given = [field for field, column in manifest.source.columns.items() if column]
    base = {"held-out loss": f"{before.loss:.3f}", "held-out perplexity": f"{before.perplexity:.2f}"}
    rows = {BASE: base | answers(first, "before")}
    for name, one in found.items():
        rows[name] = facts(one) | answers(one)
        rows[name]["columns"] = str(len(one.config["task"]["data"]["train_fields"] or given))
        rows[name]["training seconds"] = f"{one.seconds:.0f}"
        rows[name]["loss above the best"] = behind(one, best)
    said = {BASE: _said(first, "before"), **{name: _said(one, "after") for name, one in found.items()}}
    return {
        "machine": environment.machine + ("" if environment.gpus else ", no GPU"),
        "packages": environment.packages,
        "commit": environment.commit,
        "finished": max(one.evaluation.finished for one in found.values())[:10],
        "source": manifest.source.name,
        "source_sha256": manifest.source.sha256[:12],
        "rows_in": manifest.rows_in,
        "held_out_rows": first.evaluation.held_out_rows,
        "model": first.config["model"]["name"],
        "peft": first.config["peft"]["name"],
        "seed": first.config["seed"],
        "systems": rows,
        "samples": [
            {
                "prompt": " ".join(asked.asked.split()),
                "answers": {name: lines[question].text for name, lines in said.items()},
            }
            for question, asked in list(said[BASE].items())[:SAMPLES]
        ],
    }


def _said(finished: Run, side: Literal["before", "after"]) -> dict[str, Generation]:
    """A model's first answer to each question, in the order of the questions."""
    lines = Generation.read_lines(finished.folder / FILE)
    return {one.question: one for one in lines if one.side == side and one.seed == 0}


def _without_folder(word: str) -> str:
    """A file by its name alone, as where it lies is of no use to others."""
    key, _, value = word.partition("=")
    return f"{key}={Path(value).name}" if key == "task.data.source" else word
