"""What the pages say about a task: the same file that it is trained with, nemo_configs/task/<task>.yaml."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "nemo_configs" / "task"


@cache
def task_config(task: str) -> dict[str, Any]:
    """The task's own settings. Raises KeyError: there is no such task."""
    file = CONFIGS / f"{task}.yaml"
    if file.parent != CONFIGS or not file.is_file():
        raise KeyError(task)
    return yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)


def suggestions(task: str, field: str) -> list[str]:
    """What `make report` asks a model of the task, in one text each: what a visitor may want to try."""
    asked = task_config(task).get("evaluate", {}).get("questions", [])
    texts = [question.get(field) if isinstance(question, dict) else question for question in asked]
    return [text for text in texts if text]
