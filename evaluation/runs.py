"""Finding a finished run, and reading what it logged."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from nemo_configs.command_line import UserError

if TYPE_CHECKING:
    from converters.nemo_file import NemoFile


def newest_run(config: DictConfig) -> Path:
    """The folder of the task's newest finished run, or the one named by `+run=FOLDER`.

    Raises:
        UserError: there is none.
    """
    if named := config.get("run"):
        if not (Path(named) / "evaluation.json").exists():
            raise UserError(f"{named} is not a finished run: it has no evaluation.json")
        return Path(named)
    tasks = Path(config.runs_dir) / config.task.name
    finished = sorted(tasks.glob("*/evaluation.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise UserError(f"no finished run in {tasks}. Train first: make train TASK={config.task.name}")
    return finished[-1].parent


def open_run(run_folder: Path, config: DictConfig) -> tuple["NemoFile", Path]:
    """A run's archive, and the folder of its base model: `config.model.path`, or where the run had it.

    Raises:
        UserError: the archive is not whole, or the base is not there.
    """
    from converters.nemo_file import read_nemo

    trained = OmegaConf.load(run_folder / "config.yaml")
    nemo = read_nemo(run_folder / f"{trained.task.name}.nemo")
    base_folder = Path(config.model.path or trained.model.path or Path(trained.model.models_dir) / nemo.base["name"])
    if not (base_folder / "config.json").exists():
        raise UserError(f"the base model {nemo.base['name']} is not in {base_folder}. Fetch it: make base "
                        f"MODEL={nemo.base['name']}")  # fmt: skip
    return nemo, base_folder


def read_metrics(run_folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of training steps and those of validations; of a step taken twice, the later."""
    file = run_folder / "metrics.jsonl"
    kinds: dict[str, dict[int, dict[str, Any]]] = {"train_loss": {}, "val_loss": {}}
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # cut by a kill
            continue
        for key, lines in kinds.items():
            if key in line:
                lines[line["step"]] = line
    training, validation = ([lines[step] for step in sorted(lines)] for lines in kinds.values())
    return training, validation
