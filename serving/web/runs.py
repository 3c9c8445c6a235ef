"""The page of runs: what was trained, its results and report, and the card of what is being served.

Reports are opened by the names of existing folders, never by a path from a visitor.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse

from serving.web.guard import SANDBOX

MOST = 200  # runs on the page, newest first
router = APIRouter()


@dataclass(frozen=True)
class RunCard:
    """A finished run as a visitor sees it; values that its files lack are empty or None."""

    task: str
    name: str
    finished: datetime
    base: str
    method: str
    epochs: float | None
    seed: int | None
    source: str
    rows: int | None
    held_out: int | None
    before: float | None
    after: float | None
    machine: str
    has_report: bool


def finished_runs(folder: Path) -> list[RunCard]:
    """Finished runs, newest first; a folder that cannot be read is left out."""
    cards = []
    for file in folder.glob("*/*/evaluation.json"):
        try:
            cards.append(_card(file.parent, file.stat().st_mtime_ns, (file.parent / "report.html").is_file()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue
    return sorted(cards, key=lambda card: card.finished, reverse=True)[:MOST]


@lru_cache(maxsize=1000)
def _card(folder: Path, finished: int, has_report: bool) -> RunCard:
    config = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    evaluation, manifest, environment = (
        json.loads(file.read_text(encoding="utf-8")) if (file := folder / f"{name}.json").exists() else {}
        for name in ("evaluation", "data_manifest", "environment")
    )
    peft, train = config.get("peft", {}), config["task"].get("train", {})
    return RunCard(
        task=folder.parent.name,
        name=folder.name,
        finished=datetime.fromtimestamp(finished / 1e9, UTC),
        base=config["model"]["name"],
        method=" ".join([peft.get("name", ""), *([f"rank {peft['r']}"] if "r" in peft else [])]),
        epochs=train.get("epochs"),
        seed=config.get("seed"),
        source=manifest.get("source", {}).get("name", ""),
        rows=manifest.get("splits", {}).get("training", {}).get("rows"),
        held_out=evaluation.get("held_out_rows"),
        before=evaluation.get("before", {}).get("perplexity"),
        after=evaluation.get("after", {}).get("perplexity"),
        machine=", ".join(map(str, environment.get("gpus") or [])) or _cpu(environment),
        has_report=has_report,
    )


def _cpu(environment: dict[str, Any]) -> str:
    return f"{environment['cores']} cores, {environment['cpu']}" if {"cores", "cpu"} <= environment.keys() else ""


@router.get("/runs/{task}/{run}/report.html")
def report(task: str, run: str, request: Request) -> FileResponse:
    root: Path = request.app.state.settings.runs
    known = {(card.task, card.name) for card in finished_runs(root) if card.has_report}
    if (task, run) not in known:
        raise HTTPException(404, "There is no such report.")
    return FileResponse(root / task / run / "report.html", headers={"content-security-policy": SANDBOX})
