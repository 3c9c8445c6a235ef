"""Tasks with code of their own, found by their folders: `tasks/<name>/` holds what one task adds to the stages.

A stage asks for the part that it knows by name and does without it where a task has none:

    tasks/<name>/rows.py       how its rows are read and worded, see data_prep/write_splits.py
    tasks/<name>/options.py    Options, the keys of task.data.<name>, see core/configuration.py
    tasks/<name>/metrics.py    METRICS beside those of every task, see evaluation/metrics.py
    tasks/<name>/page.py       PAGE, a page of the website, see serving/web/page.py
    tasks/<name>/new_task.py   which tables `make new-task` gives to it, see data_prep/new_task.py

A task's YAML names the folder in `task.data.module` (rows, options) and `task.evaluate.metrics`; several tasks may name
the same one. Nothing lists the folders: to delete one, with the YAML files that name it, is to delete the task.

`tasks` is a namespace package: a folder `tasks/` anywhere on Python's path adds to it, so a task may live outside this
repository. Its YAML then lies beside that folder, in `nemo_configs/task/`.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG_DIR = ROOT / "nemo_configs"


def folders() -> list[Path]:
    """Every folder that tasks are found in, this repository's among them; none where all have been deleted."""
    spec = find_spec("tasks")
    return [Path(path) for path in spec.submodule_search_locations or []] if spec else []


def foreign_config_dirs() -> list[Path]:
    """The `nemo_configs` folders beside the `tasks` folders that lie outside this repository."""
    beside = (folder.resolve().parent / CONFIG_DIR.name for folder in folders())
    return [folder for folder in beside if folder != CONFIG_DIR and folder.is_dir()]


def having(part: str) -> list[str]:
    """The names of the tasks that have `<part>.py`, sorted."""
    return sorted({file.parent.name for folder in folders() for file in folder.glob(f"*/{part}.py")})


def part_of(name: str, part: str, key: str) -> ModuleType:
    """The module `<part>.py` of the task folder `name`.

    Args:
        key: the configuration key that names the folder, for the error, e.g. "task.data.module".

    Raises:
        UserError: there is no such folder, or it has no such part.
    """
    known = having(part)
    if name not in known:
        raise UserError(f"{key}={name} is unknown. Known: {', '.join([*known, 'null'])}")
    return import_module(f"tasks.{name}.{part}")
