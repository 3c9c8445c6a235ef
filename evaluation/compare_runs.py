"""The finished runs of a task side by side: bases, ranks, LoRA and QLoRA, engines, experiments.

A table in the terminal, and `runs/<task>/comparison.html`, one file without scripts. A table holds only runs that were
measured on the same test split.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from markupsafe import Markup

from core.artifacts import Estimate
from core.errors import UserError
from core.run_folder import Run, finished_runs, named_run
from core.schema import Config
from evaluation.gate import gain
from evaluation.intervals import estimates, held_out
from evaluation.report import cell


def facts(finished: Run) -> dict[str, str]:
    """Column → its text for a run: configuration, cost and results."""
    config, evaluation = finished.config, finished.evaluation
    before, after = evaluation.before, evaluation.after
    engine = "" if config.get("engine", "lightning") == "lightning" else f", {config['engine']}"
    peak, training = evaluation.peak_memory_gib, finished.manifest and finished.manifest.splits["training"]
    measured = held_out(evaluation)
    return {
        "run": config.get("experiment_name") or finished.folder.name,
        "base": config["model"]["name"],
        "peft": f"{config['peft']['name']}{engine}",
        "rank": str(config["peft"]["r"]),
        "learning rate": f"{float(config['task']['train']['learning_rate']):g}",
        "training examples": f"{training.rows:,}" if training else "",
        "epochs": str(config["task"]["train"]["epochs"]),
        "steps": f"{finished.steps[-1].step:,}" if finished.steps else "",
        "training time": f"{finished.seconds / 60:.1f} min",
        "tokens/s (median)": f"{finished.tokens_per_second:,.0f}",
        "peak memory": f"{peak:.1f} GiB" if peak else "",
        "validation loss": f"{finished.validations[-1].val_loss:.3f}" if finished.validations else "",
        "held-out loss": f"{after.loss:.3f}",
        "base's perplexity": f"{before.perplexity:.2f}",
        "held-out perplexity": f"{after.perplexity:.2f}",
        "gain": _with_range(measured.gain if measured else (gain(evaluation), None, None), "%"),
    }


def behind(finished: Run, best: Run) -> str:
    """By how much a run's held-out loss exceeds the best, with a paired interval; "" where their tokens differ."""
    ours, theirs = (np.array(one.evaluation.after.rows, dtype=float) for one in (finished, best))
    if finished is best:
        return "the best"
    if not len(ours) or ours.shape != theirs.shape or (ours[:, 1] != theirs[:, 1]).any():
        return ""
    value, low, high = estimates(theirs, ours).difference
    return f"{value:+.3f}" + ("" if low is None else f" ({low:+.3f} to {high:+.3f})")


def answers(finished: Run, side: Literal["before", "after"] = "after") -> dict[str, str]:
    """Metric → what the fine-tuned model, or the base model ("before"), reached in `make report`; {} for a run without
    it."""
    metrics = finished.metrics.metrics if finished.metrics else []
    return {one.title: f"{_with_range(getattr(one, side), one.unit)}, {one.questions} questions" for one in metrics}


def _with_range(estimate: Estimate, unit: str) -> str:
    shown = cell(estimate, unit)
    return f"{shown.value} ({shown.range})" if shown.range else shown.value


@dataclass
class Comparison:
    """Runs that were measured on the same test split, those with the lowest loss first.

    Attributes:
        lines: a fact or a metric each, `[its title, a text for each run, …]`.
        plots: see `evaluation.plots.draw_comparison`; none until they are drawn.
    """

    title: str
    runs: list[Run]
    lines: list[list[str]]
    notes: list[str]
    plots: dict[str, Markup] = field(default_factory=dict)


def compare(finished: Iterable[Run]) -> list[Comparison]:
    """One for each test split that runs were measured on."""
    by_rows: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for one in finished:
        test = one.manifest.splits["test"].sha256 if one.manifest else one.folder.name
        by_rows[test, one.evaluation.held_out_rows].append(one)
    comparisons = []
    for (test, rows), members in by_rows.items():
        members.sort(key=lambda one: one.evaluation.after.loss)
        told = [facts(one) | {"loss above the best": behind(one, members[0])} for one in members]
        asked = [one for one in members if one.metrics]
        same = [one for one in asked if _asked(one) == _asked(asked[0])]
        for one, facts_of_it in zip(members, told, strict=True):
            facts_of_it |= answers(one) if one in same else {}
        titles = dict.fromkeys(title for one in told for title in one)
        comparisons.append(
            Comparison(
                f"{rows:,} held-out rows of {members[0].source_name} (sha256 {test[:8]})",
                members,
                [[title, *(one.get(title, "") for one in told)] for title in titles],
                _notes(members, asked, same),
            )
        )
    return comparisons


def _asked(finished: Run) -> str:
    assert finished.metrics
    return json.dumps([finished.metrics.sampling, finished.metrics.settings], sort_keys=True)


def _notes(members: list[Run], asked: list[Run], same: list[Run]) -> list[str]:
    notes = []
    if len({tuple(tokens for _, tokens in one.evaluation.after.rows) for one in members}) > 1:
        notes.append(
            "These models tokenize the examples differently: losses and perplexities are per token and cannot be "
            "compared between them. Gains are relative to each run's own base."
        )
    others = [one.folder.name for one in members if one not in asked]
    if asked and others:
        notes.append(f"Answers not measured yet (make report ARGS=run=FOLDER): {', '.join(others)}.")
    if len(same) < len(asked):
        notes.append(
            f"Evaluated with other questions or another sampling: "
            f"{', '.join(one.folder.name for one in asked if one not in same)}."
        )
    return notes


def choose(config: Config, names: str) -> list[Run]:
    """All finished runs of the task, or those of `names`, by name or folder, separated by spaces."""
    tasks = Path(config.runs_dir) / config.task.name
    folders = [named_run(tasks / name if (tasks / name).exists() else Path(name)) for name in names.split()]
    chosen = [Run.read(folder) for folder in folders or finished_runs(config)]
    if others := [one for one in chosen if one.task != config.task.name]:
        raise UserError(f"{others[0].folder} is a run of {others[0].task}, not of {config.task.name}")
    return chosen


def show(comparisons: list[Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for comparison in comparisons:
        console.width = max(console.width, 40 + 30 * len(comparison.runs))  # rather a wide table than a torn one
        table = Table(title=comparison.title, title_justify="left")
        for number, title in enumerate(comparison.lines[0]):
            table.add_column(title, justify="right" if number else "left", overflow="fold")
        for line in comparison.lines[1:]:
            table.add_row(*line)
        console.print(table)
        for note in comparison.notes:
            console.print(note, markup=False, highlight=False)
