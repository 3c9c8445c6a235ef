"""Finished runs: finding them, and reading what they left (core/artifacts.py)."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from core.artifacts import Environment, Evaluation, Manifest, Metrics, MetricsLine
from core.errors import UserError
from core.files import read_json
from core.gemma_config import is_whole
from core.schema import Config


@dataclass(frozen=True)
class Run:
    """What a finished run's folder holds; None for a file that is missing.

    Attributes:
        config: `config.yaml`.
        evaluation: `evaluation.json`, of training.
        manifest, environment: `data_manifest.json`, `environment.json`.
        metrics: `metrics.json`, of `make report`.
        steps, validations: the lines of `metrics.jsonl`, see `read_metrics`.
    """

    folder: Path
    config: dict[str, Any]
    evaluation: Evaluation
    manifest: Manifest | None
    environment: Environment | None
    metrics: Metrics | None
    steps: list[MetricsLine]
    validations: list[MetricsLine]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """
        Raises:
            UserError: a file that is damaged, or of an unknown format; or no `evaluation.json`.
        """
        config = _read_config(folder / "config.yaml")
        steps, validations = read_metrics(folder)
        return cls(
            folder,
            config,
            Evaluation.read(folder / "evaluation.json"),
            Manifest.read_if_there(folder / "data_manifest.json"),
            Environment.read_if_there(folder / "environment.json"),
            Metrics.read_if_there(folder / "metrics.json"),
            steps,
            validations,
        )

    @property
    def task(self) -> str:
        return self.config["task"]["name"]

    @property
    def archive(self) -> Path:
        return self.folder / f"{self.task}.nemo"

    @property
    def seconds(self) -> float:
        """Of training, without validations."""
        return sum(line.seconds or 0 for line in self.steps)

    @property
    def step_seconds(self) -> float:
        """Median time of a step; a line may be of several steps."""
        return median(line.seconds and line.seconds / line.steps for line in self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Median over the lines of training."""
        return median(line.tokens_per_second for line in self.steps)

    @property
    def source_name(self) -> str:
        """Of the table that the run was trained on; "" where it is not on record."""
        return self.manifest.source.name if self.manifest else ""

    def data_folder(self, now: Config | None = None) -> Path:
        """Its own `data_dir`, or that of the configuration `now`, whichever has the examples it was trained on.

        Raises:
            UserError: neither does; it says what differs.
        """
        for folder in (self.config["data_dir"], *([now.data_dir] if now else ())):
            manifest = Manifest.read_if_there(Path(folder) / "manifest.json")
            if manifest and _hashes(manifest) == _hashes(self.manifest):
                return Path(folder)
        there = Manifest.read_if_there(Path(self.config["data_dir"]) / "manifest.json")
        changed = _changed(self.config["task"]["data"], now.task.data.model_dump(exclude_unset=True) if now else {})
        if self.manifest and there and self.manifest.source.sha256 == there.source.sha256:
            changed = [one for one in changed if one[0] != "task.data.source"]  # prepared from the same file
        args = " ".join(f"{name}={then}" for name, then, _ in changed if name != "task.data.source")
        differs = [f"the run had {name}={then}, which is {today} now" for name, then, today in changed]
        raise UserError(
            f"{self.config['data_dir']} does not hold the examples that {self.folder} was trained on: "
            f"{'; '.join([*differs, _difference(self.manifest, there)])}. Prepare them as then: make data "
            f"TASK={self.task} SOURCE={self.config['task']['data'].get('source', '…')}"
            f"{f' ARGS={quote(args)}' if args else ''}; or name the folder that holds them: ARGS=data_dir=FOLDER"
        )


def _changed(then: Mapping[str, Any], now: Mapping[str, Any], above: str = "task.data") -> list[tuple[str, str, str]]:
    """`(key, value then, value now)` of the options that differ, where both are known."""
    found = list[tuple[str, str, str]]()
    for name, value in then.items():
        if name in now and isinstance(value, dict) and isinstance(now[name], dict):
            found += _changed(value, now[name], f"{above}.{name}")
        elif name in now and value != now[name]:
            was, today = ("null" if it is None else str(it) for it in (value, now[name]))
            found.append((f"{above}.{name}", was, today))
    return found


def _difference(then: Manifest | None, there: Manifest | None) -> str:
    """How the rows that are there differ from those of a run, in words."""
    if not then or not there:
        return "no manifest is there" if then else "the run has no manifest"
    if then.source.sha256 != there.source.sha256:
        of = [f"{one.source.name} (SHA-256 {one.source.sha256[:12]})" for one in (then, there)]
        return f"the run's rows are of {of[0]}, those there of {of[1]}"
    rows = [" / ".join(str(split.rows) for split in manifest.splits.values()) for manifest in (then, there)]
    if rows[0] != rows[1]:
        return f"the run had {rows[0]} rows in its splits, and {rows[1]} are there"
    return "the rows are as many, but not the same; another version of this project may have made them"


def _hashes(manifest: Manifest | None) -> dict[str, str]:
    return {name: split.sha256 for name, split in manifest.splits.items()} if manifest else {}


def median(values: Iterable[float | None]) -> float:
    """Of those that are known; 0 where none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else 0.0


def _read_config(file: Path) -> dict[str, Any]:
    """A run's `config.yaml` as it stands. Raises UserError: it is missing or damaged."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
    lacking = [name for name in ("task", "model") if not isinstance(config, dict) or name not in config]
    if lacking:
        raise UserError(f"{file} is damaged: it has no section {', '.join(lacking)}")
    return config


def finished_runs(config: Config) -> list[Path]:
    """The folders of the task's finished runs, the newest last.

    Raises:
        UserError: there is none.
    """
    tasks = Path(config.runs_dir) / config.task.name
    finished = sorted(tasks.glob("*/evaluation.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise UserError(f"no finished run in {tasks}. Train first: make train TASK={config.task.name}")
    return [file.parent for file in finished]


def newest_run(config: Config) -> Path:
    """The folder of the task's newest finished run, or the one named by `run=FOLDER`.

    Raises:
        UserError: there is none.
    """
    if config.run:
        return named_run(Path(config.run))
    return finished_runs(config)[-1]


def named_run(folder: Path) -> Path:
    """`folder`, if it is a finished run; else a UserError."""
    if not (folder / "evaluation.json").exists():
        raise UserError(f"{folder} is not a finished run: it has no evaluation.json")
    return folder


def base_of(run: Run, config: Config) -> Path:
    """The folder of a run's base model, a text model: `config.model.path`, or where the run had it.

    Raises:
        UserError: it is not there.
    """
    from core.base_model import local_base

    model = run.config["model"]
    folder = Path(config.model.path or model["path"] or Path(model["models_dir"]) / model["name"])
    if not (folder / "config.json").exists():
        name = model["name"]
        raise UserError(f"the base model {name} is not in {folder}. Fetch it: make base MODEL={name}")
    return local_base(folder, Path(config.model.models_dir)) if is_whole(read_json(folder / "config.json")) else folder


def read_metrics(run_folder: Path) -> tuple[list[MetricsLine], list[MetricsLine]]:
    """The lines of training steps and those of validations, by step; of a step that was repeated, the later line."""
    steps: dict[int, MetricsLine] = {}
    validations: dict[int, MetricsLine] = {}
    for line in MetricsLine.read_lines(run_folder / "metrics.jsonl"):
        if line.train_loss is not None:
            steps[line.step] = line
        elif line.val_loss is not None:
            validations[line.step] = line
    return [steps[step] for step in sorted(steps)], [validations[step] for step in sorted(validations)]
