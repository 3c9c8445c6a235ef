"""What a run is made of, so that one run never mixes two configurations, bases or data sets."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from core.artifacts import Environment, Manifest
from core.base_model import describe
from core.configuration import plain
from core.errors import UserError

# Where files lie, how many processes share a step, how much memory it may take, who watches and what is asked
# afterwards do not change the result, beyond rounding: a run that was stopped may go on with others.
WITHOUT_EFFECT = (
    "runs_dir",
    "data_dir",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.micro_batch_tokens",
    "trainer.wandb",
    "task.train.log_every",
)
AFTERWARDS = ("task.evaluate.", "judge.")


def made_of(config: DictConfig, base_folder: Path, data_folder: Path) -> dict[str, Any]:
    """All that decides the result of a run, flat: `{"task.train.epochs": 3, "base": <sha256>, "data.training": …}`.

    Raises:
        UserError: the rows are not those that were prepared.
    """
    manifest = Manifest.read(data_folder / "manifest.json")
    for name, split in manifest.splits.items():
        file = data_folder / f"{name}.jsonl"
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != split.sha256:
            raise UserError(
                f"{file} was changed after it was prepared: its sha256 is {found[:12]}…, manifest.json says "
                f"{split.sha256[:12]}…. Delete {data_folder} to prepare it anew; give rows of your own as SOURCE"
            )
    return _identity(plain(config), describe(base_folder)["sha256"], manifest)


def refuse_changed_records(run_folder: Path, now: dict[str, Any]) -> None:
    """Raises a UserError when a run that is under way and the command that would continue it differ.

    The folder is named by a hash of `now`, so this takes an edited record or a folder put there by hand.
    """
    if any((run_folder / "checkpoints").glob("step=*.ckpt")):
        _refuse(recorded(run_folder), now, f"the records in {run_folder}")


def refuse_other(checkpoint: Path, now: dict[str, Any]) -> None:
    """Raises a UserError when `checkpoint` belongs to a run made of other things."""
    import torch

    then = torch.load(checkpoint, map_location="cpu", weights_only=True)["made_of"]
    _refuse(then, now, str(checkpoint))


def _refuse(then: dict[str, Any], now: dict[str, Any], what: str) -> None:
    if changes := differences(then, now):
        raise UserError(
            f"{what} and this command differ: {changes}. A run goes on only as it began. Put the file back, or move "
            "the folder away to train anew; what you want changed belongs into the command, as ARGS=key=value"
        )


def unfinished_neighbour(run_folder: Path, now: dict[str, Any]) -> str:
    """How this run, not begun yet, differs from the newest unfinished one of the same task, model and PEFT; or ''."""
    if (run_folder / "checkpoints").exists():
        return ""
    others = [
        checkpoints.parent
        for checkpoints in run_folder.parent.glob("*/checkpoints")
        if any(checkpoints.glob("step=*.ckpt")) and not (checkpoints.parent / "report.html").exists()
    ]
    for other in sorted(others, key=lambda folder: (folder / "checkpoints").stat().st_mtime, reverse=True):
        then = recorded(other)
        if all(then.get(key) == now[key] for key in ("task.name", "model.name", "peft.name")):
            return f"{other} is unfinished, and differs: {differences(then, now)}. This starts another run"
    return ""


def recorded(run_folder: Path) -> dict[str, Any]:
    """`made_of` as a run's folder has it on record."""
    config = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
    base = Environment.read(run_folder / "environment.json").base
    return _identity(config, base, Manifest.read(run_folder / "data_manifest.json"))


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """`task.train.epochs 3 → 5, seed 0 → 1`, or '' where there are none."""
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return ", ".join(f"{key} {_short(then.get(key))} → {_short(now.get(key))}" for key in keys)


def _identity(config: dict[str, Any], base: str, manifest: Manifest) -> dict[str, Any]:
    flat = {key: value for key, value in _flat(config) if not key.startswith(("task.data.", "model.", *AFTERWARDS))}
    for key in WITHOUT_EFFECT:
        flat.pop(key, None)
    data = {f"data.{name}": split.sha256 for name, split in manifest.splits.items()}
    return {**flat, "model.name": config["model"]["name"], "base": base, **data}


def _flat(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        return [(name, tree)]
    return [pair for key, value in tree.items() for pair in _flat(value, f"{name}.{key}" if name else str(key))]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
