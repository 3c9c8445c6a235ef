"""Pages of the site that tasks bring with them: `tasks/<name>/page.py` holds PAGE, an object of the class below.

The site finds these pages in every `tasks` folder on Python's path; nothing lists them. Beside page.py stand:

    page.html      the page's template, which extends "base.html" of serving/web/templates/
    static/        optional: its scripts, styles and pictures, served at /static/<name>/
    privacy.html   optional: paragraphs for the site's privacy page

Everything else in the folder stays private.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fastapi import APIRouter

from core.errors import UserError
from core.tasks import CONFIG_DIR, foreign_config_dirs, having, part_of
from serving.client import Adapter
from serving.rate_limit import Rate
from serving.web.settings import Settings

# Paths that the site itself answers, which a page called so would hide or be hidden by.
TAKEN = ("api", "health", "privacy", "runs", "sign-in", "static")


def _as_it_is(fields: dict[str, str]) -> dict[str, str]:
    return fields


def _nothing(settings: Settings) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Page:
    """A page at `/<name>`, the name being that of its folder; the first of all pages is the front page too.

    Attributes:
        task: the task that the page is about, by its file in nemo_configs/task/. Without it the page is left out.
        title: what the navigation calls it.
        order: its place in the navigation; pages of one place are sorted by name.
        values: variables for page.html, asked for at each visit. Every template also knows `page` (its own name),
            `task`, `clean`, `has_password` and `served_names` (None while that is not known); "not_served.html" says
            where the task is not served.
        router: routes of the page's own, such as /api/<name>/... for its script.
        rates: limits for POST requests to these routes, by path.
        start: called once, in a thread, before the first visitor.
        answered: called when the task's model has answered, with its adapter, the fields of its prompt and those read
            from the answer; the result joins the `done` event of serving/web/answers.py.
        tidy: the fields of an answer as they are shown and kept, complete or still growing.
        seeds: how many answers are asked for where the page's script wants choices, see serving/web/choices.py.
        refuses: called with the same when the first field of an answer is complete: why it is no choice, "" if it is.
    """

    task: str
    title: str
    order: int = 100
    values: Callable[[Settings], dict[str, Any]] = _nothing
    router: APIRouter | None = None
    rates: Mapping[str, Rate] = field(default_factory=dict)
    start: Callable[[Settings], object] | None = None
    answered: Callable[[Settings, Adapter, Mapping[str, str], Mapping[str, str]], dict[str, Any]] | None = None
    tidy: Callable[[dict[str, str]], dict[str, str]] = _as_it_is
    seeds: int = 1
    refuses: Callable[[Settings, Adapter, Mapping[str, str], Mapping[str, str]], str] | None = None


class FoundPage(NamedTuple):
    """A page and the folder that it was found in; `path` is where the navigation leads."""

    name: str
    path: str
    folder: Path
    page: Page


def find_pages() -> list[FoundPage]:
    """The pages of all tasks that are configured, in the order of the navigation.

    Raises:
        UserError: a folder has the name of a path that the site answers itself.
    """
    found = []
    for name in having("page"):
        module = part_of(name, "page", "page")
        folder = Path(module.__file__ or "").parent
        if name in TAKEN:
            raise UserError(f"{folder}: the site answers /{name} itself; give the folder another name")
        if _file_of(module.PAGE.task):
            found.append(FoundPage(name, f"/{name}", folder, module.PAGE))
    found.sort(key=lambda one: (one.page.order, one.name))
    return [one._replace(path="/") if place == 0 else one for place, one in enumerate(found)]


@cache
def task_config(task: str) -> dict[str, Any]:
    """The task's YAML as it stands, the same that it is trained with; interpolations are not resolved.

    Raises:
        KeyError: there is no such task.
    """
    if (file := _file_of(task)) is None:
        raise KeyError(task)
    return yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)


def _file_of(task: str) -> Path | None:
    """The task's YAML, in this repository or beside another folder of tasks."""
    files = (folder / "task" / f"{task}.yaml" for folder in (CONFIG_DIR, *foreign_config_dirs()))
    return next((file for file in files if file.is_file() and file.stem == task), None)


def suggestions(task: str, field: str) -> list[str]:
    """Texts a visitor may want to try: the values of `field` in the questions of the task's report."""
    asked = task_config(task).get("evaluate", {}).get("questions", [])
    texts = [question.get(field) if isinstance(question, dict) else question for question in asked]
    return [text for text in texts if text]
