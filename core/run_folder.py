"""Finished runs: finding them, and reading what they left (core/artifacts.py)."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
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

    def data_folder(self, *folders: str) -> Path:
        """The first of its own `data_dir` and `folders` that holds the examples it was trained and measured on.

        Raises:
            UserError: none does.
        """
        for folder in (self.config["data_dir"], *folders):
            manifest = Manifest.read_if_there(Path(folder) / "manifest.json")
            if manifest and _hashes(manifest) == _hashes(self.manifest):
                return Path(folder)
        raise UserError(
            f"{self.config['data_dir']} does not hold the examples that {self.folder} was trained on. Prepare them "
            f"again from {self.source_name or 'the same table'}: make data TASK={self.task} SOURCE=…, or name the "
            "folder that holds them: ARGS=data_dir=FOLDER"
        )


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
