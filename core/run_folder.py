"""Finished runs: finding them, and reading what they left."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from core.errors import UserError
from core.files import Lines, read_json, read_lines


@dataclass(frozen=True)
class Run:
    """What a finished run's folder holds; a file that is missing is empty here.

    Attributes:
        config, manifest, environment: `config.yaml`, `data_manifest.json`, `environment.json`.
        evaluation: `evaluation.json`, of training; `metrics`: `metrics.json`, of `make report`.
        steps, validations: the lines of `metrics.jsonl`, see `read_metrics`.
    """

    folder: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    environment: dict[str, Any]
    evaluation: dict[str, Any]
    metrics: dict[str, Any]
    steps: Lines
    validations: Lines

    @classmethod
    def read(cls, folder: Path) -> "Run":
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        names = ("data_manifest", "environment", "evaluation", "metrics")
        manifest, environment, evaluation, metrics = (read_json(folder / f"{name}.json") for name in names)
        return cls(folder, config, manifest, environment, evaluation, metrics, *read_metrics(folder))

    @property
    def task(self) -> str:
        return self.config["task"]["name"]

    @property
    def archive(self) -> Path:
        return self.folder / f"{self.task}.nemo"

    @property
    def seconds(self) -> float:
        """Of training, validations left out."""
        return sum(step.get("seconds", 0) for step in self.steps)

    def median(self, key: str) -> float:
        """Of what the lines of training say about `key`; 0 where they do not."""
        values = [step[key] for step in self.steps if key in step]
        return statistics.median(values) if values else 0.0

    @property
    def step_seconds(self) -> float:
        """Median of a step; a line of training may be of several."""
        seconds = [line["seconds"] / line.get("steps", 1) for line in self.steps if "seconds" in line]
        return statistics.median(seconds) if seconds else 0.0

    def data_folder(self, *folders: str) -> Path:
        """The first of its own `data_dir` and `folders` that holds the rows it was trained and measured on.

        Raises:
            UserError: none does.
        """
        for folder in (self.config["data_dir"], *folders):
            manifest = read_json(Path(folder) / "manifest.json")
            if manifest and _rows_of(manifest) == _rows_of(self.manifest):
                return Path(folder)
        source = self.manifest.get("source", {}).get("name", "its table")
        raise UserError(
            f"{self.config['data_dir']} does not hold the rows of {self.folder}. Prepare them again, from {source}: "
            f"make data TASK={self.task} SOURCE=…, or name their folder: ARGS=data_dir=FOLDER"
        )


def _rows_of(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: split["sha256"] for name, split in manifest.get("splits", {}).items()}


def finished_runs(config: DictConfig) -> list[Path]:
    """The folders of the task's finished runs, the newest last.

    Raises:
        UserError: there is none.
    """
    tasks = Path(config.runs_dir) / config.task.name
    finished = sorted(tasks.glob("*/evaluation.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise UserError(f"no finished run in {tasks}. Train first: make train TASK={config.task.name}")
    return [file.parent for file in finished]


def newest_run(config: DictConfig) -> Path:
    """The folder of the task's newest finished run, or the one named by `+run=FOLDER`.

    Raises:
        UserError: there is none.
    """
    if named := config.get("run"):
        return named_run(Path(named))
    return finished_runs(config)[-1]


def named_run(folder: Path) -> Path:
    """`folder`, if it is a finished run; else a UserError."""
    if not (folder / "evaluation.json").exists():
        raise UserError(f"{folder} is not a finished run: it has no evaluation.json")
    return folder


def base_of(run: Run, config: DictConfig) -> Path:
    """The folder of a run's base model: `config.model.path`, or where the run had it. Raises a UserError: not there."""
    model = run.config["model"]
    folder = Path(config.model.path or model["path"] or Path(model["models_dir"]) / model["name"])
    if not (folder / "config.json").exists():
        name = model["name"]
        raise UserError(f"the base model {name} is not in {folder}. Fetch it: make base MODEL={name}")
    return folder


def read_metrics(run_folder: Path) -> tuple[Lines, Lines]:
    """The lines of training steps and those of validations; of a step taken twice, the later."""
    kinds: dict[str, dict[int, dict[str, Any]]] = {"train_loss": {}, "val_loss": {}}
    for line in read_lines(run_folder / "metrics.jsonl"):
        for key, lines in kinds.items():
            if key in line:
                lines[line["step"]] = line
    training, validation = ([lines[step] for step in sorted(lines)] for lines in kinds.values())
    return training, validation
