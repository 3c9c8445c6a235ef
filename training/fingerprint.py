"""The fingerprint of a run, so that one run never mixes two configurations, base models or data sets."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from core.base_model import describe
from core.configuration import plain
from core.errors import UserError
from core.schema import Config

# Where files lie, how many processes share a step, how much memory it may take, what is logged and what is evaluated
# afterwards do not change the result beyond rounding: an interrupted run may be resumed with other values.
WITHOUT_EFFECT = (
    "runs_dir",
    "data_dir",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.micro_batch_tokens",
    "trainer.table_in_main_memory",
    "trainer.wandb",
    "task.train.log_every",
    "task.title",
)
AFTERWARDS = ("task.evaluate.", "judge.")
CHECKPOINT_KEY = "made_of"  # of the fingerprint in a checkpoint file


def name_run(config: Config, base_folder: Path, fingerprint: dict[str, Any]) -> Path:
    """`runs/<task>/<model>-<peft>[-automodel][-<experiment>]-<hash of configuration, base and data>`."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:8]
    engine = "" if config.engine == "lightning" else config.engine
    parts = [describe(base_folder)["name"], config.peft.name, engine, config.experiment_name, digest]
    return Path(config.runs_dir) / config.task.name / "-".join(part for part in parts if part)


def run_fingerprint(config: Config, base_folder: Path, data_folder: Path) -> dict[str, Any]:
    """Everything that decides the result of a run, as one flat dictionary.

    Example: `{"task.train.epochs": 3, …, "model.name": "gemma-3-270m", "base": SHA-256, "data.training": SHA-256, …}`

    Raises:
        UserError: a split is not the one that was prepared.
    """
    manifest = json.loads((data_folder / "manifest.json").read_text())
    for name, split in manifest["splits"].items():
        file = data_folder / f"{name}.jsonl"
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != split["sha256"]:
            raise UserError(
                f"{file} was changed after it was prepared: its sha256 is {found[:12]}…, manifest.json says "
                f"{split['sha256'][:12]}…. Delete {data_folder} to prepare it again; pass your own data as SOURCE"
            )
    return _flatten(plain(config), describe(base_folder)["sha256"], manifest)


def check_records(run_folder: Path, current: dict[str, Any]) -> None:
    """Refuse to resume a run whose recorded fingerprint differs from `current`.

    The folder's name has a hash of the fingerprint, so this takes an edited record or a folder put there by hand.

    Raises:
        UserError: they differ.
    """
    if any((run_folder / "checkpoints").glob("step=*.ckpt")):
        _refuse_difference(recorded_fingerprint(run_folder), current, f"the records in {run_folder}")


def check_checkpoint(checkpoint: Path, current: dict[str, Any]) -> None:
    """
    Raises:
        UserError: `checkpoint` belongs to a run with another fingerprint.
    """
    import torch

    recorded = torch.load(checkpoint, map_location="cpu", weights_only=True)[CHECKPOINT_KEY]
    _refuse_difference(recorded, current, str(checkpoint))


def _refuse_difference(recorded: dict[str, Any], current: dict[str, Any], what: str) -> None:
    if changes := differences(recorded, current):
        raise UserError(
            f"{what} and this command differ: {changes}. A run is resumed only with the settings that it began with. "
            "Restore the file, or move the folder away to train again; pass changes on the command line, as "
            "ARGS=key=value"
        )


def describe_unfinished_run(run_folder: Path, current: dict[str, Any]) -> str:
    """How this new run differs from the newest unfinished one of the same task, model and PEFT method, for the user's
    information; or "" where there is none."""
    if (run_folder / "checkpoints").exists():
        return ""
    others = [
        checkpoints.parent
        for checkpoints in run_folder.parent.glob("*/checkpoints")
        if any(checkpoints.glob("step=*.ckpt")) and not (checkpoints.parent / "report.html").exists()
    ]
    for other in sorted(others, key=lambda folder: (folder / "checkpoints").stat().st_mtime, reverse=True):
        recorded = recorded_fingerprint(other)
        if all(recorded.get(key) == current[key] for key in ("task.name", "model.name", "peft.name")):
            return f"{other} is unfinished and differs: {differences(recorded, current)}. This starts another run"
    return ""


def recorded_fingerprint(run_folder: Path) -> dict[str, Any]:
    """The fingerprint of the run in `run_folder`, from its config.yaml, environment.json and data_manifest.json."""
    config = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
    base = json.loads((run_folder / "environment.json").read_text())["base"]
    return _flatten(config, base, json.loads((run_folder / "data_manifest.json").read_text()))


def differences(recorded: dict[str, Any], current: dict[str, Any]) -> str:
    """`task.train.epochs 3 → 5, seed 0 → 1`, or "" where there are none."""
    keys = [key for key in {**recorded, **current} if recorded.get(key) != current.get(key)]
    return ", ".join(f"{key} {_short(recorded.get(key))} → {_short(current.get(key))}" for key in keys)


def _flatten(config: dict[str, Any], base: str, manifest: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in _flat(config) if not key.startswith(("task.data.", "model.", *AFTERWARDS))}
    for key in WITHOUT_EFFECT:
        flat.pop(key, None)
    data = {f"data.{name}": split["sha256"] for name, split in manifest["splits"].items()}
    return {**flat, "model.name": config["model"]["name"], "base": base, **data}


def _flat(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        return [(name, tree)]
    return [pair for key, value in tree.items() for pair in _flat(value, f"{name}.{key}" if name else str(key))]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
