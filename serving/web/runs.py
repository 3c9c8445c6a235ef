"""The page of runs: what was trained, its results and report, and the card of what is being served.

Reports are opened by the names of existing folders, never by a path from a visitor.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import yaml
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse

from core.artifacts import Environment, Evaluation, Manifest
from core.errors import UserError
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
        except (OSError, UserError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue
    return sorted(cards, key=lambda card: card.finished, reverse=True)[:MOST]


@lru_cache(maxsize=1000)
def _card(folder: Path, finished: int, has_report: bool) -> RunCard:
    config = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    evaluation = Evaluation.read(folder / "evaluation.json")
    manifest = Manifest.read_if_there(folder / "data_manifest.json")
    environment = Environment.read_if_there(folder / "environment.json")
    peft, train = config.get("peft", {}), config["task"].get("train", {})
    return RunCard(
        task=folder.parent.name,
        name=folder.name,
        finished=datetime.fromtimestamp(finished / 1e9, UTC),
        base=config["model"]["name"],
        method=" ".join([peft.get("name", ""), *([f"rank {peft['r']}"] if "r" in peft else [])]),
        epochs=train.get("epochs"),
        seed=config.get("seed"),
        source=manifest.source.name if manifest else "",
        rows=manifest.splits["training"].rows if manifest else None,
        held_out=evaluation.held_out_rows,
        before=evaluation.before.perplexity,
        after=evaluation.after.perplexity,
        machine=environment.machine if environment else "",
        has_report=has_report,
    )


@router.get("/runs/{task}/{run}/report.html")
def report(task: str, run: str, request: Request) -> FileResponse:
    root: Path = request.app.state.settings.runs
    known = {(card.task, card.name) for card in finished_runs(root) if card.has_report}
    if (task, run) not in known:
        raise HTTPException(404, "There is no such report.")
    return FileResponse(root / task / run / "report.html", headers={"content-security-policy": SANDBOX})
