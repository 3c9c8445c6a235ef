"""Tasks with code of their own, found by their folders: `tasks/<name>/` holds what one task adds to the stages.

A stage asks for the part that it knows by name and does without it where a task has none:

    tasks/<name>/rows.py      reading its rows and wording them, see data_prep/write_splits.py
    tasks/<name>/metrics.py   METRICS beside the usual ones, see evaluation/metrics.py

`tasks` is a namespace package: a folder `tasks/` anywhere on Python's path adds to it, so a task may live outside this
repository. Its YAML then lies beside that folder, in `nemo_configs/task/`.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from core.errors import UserError


def folders() -> list[Path]:
    """Every folder that tasks are found in, this repository's among them; none where all have been deleted."""
    spec = find_spec("tasks")
    return [Path(path) for path in spec.submodule_search_locations or []] if spec else []


def having(part: str) -> list[str]:
    """The names of the tasks that have `<part>.py`, sorted."""
    return sorted({file.parent.name for folder in folders() for file in folder.glob(f"*/{part}.py")})


def part_of(name: str, part: str, key: str) -> ModuleType:
    """The module `<part>.py` of the task folder `name`.

    Args:
        key: of the configuration, for the error, e.g. "task.data.module".

    Raises:
        UserError: there is no such folder, or it has no such part.
    """
    known = having(part)
    if name not in known:
        raise UserError(f"{key}={name} is unknown. Known: {', '.join([*known, 'null'])}")
    return import_module(f"tasks.{name}.{part}")
