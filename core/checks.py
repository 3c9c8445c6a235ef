"""A resolved tree against the schema: the typed configuration, or a sentence for each thing that is wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from core import tasks
from core.schema import Config, DataConfig
from core.validation import did_you_mean, sentence

Keys = tuple[str | int, ...]  # the way to a value in the tree, e.g. ("task", "evaluate", "questions", 2)


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with the value at `path` of the tree."""

    path: Keys
    says: str


def check(tree: Mapping[str, Any]) -> tuple[Config | None, list[Problem]]:
    """The typed configuration of a resolved tree, or all that is wrong with it."""
    data = (tree.get("task") or {}).get("data") if isinstance(tree.get("task"), dict) else None
    problems, made = _check_options(data) if isinstance(data, dict) else ([], {})
    if made:
        tree = {**tree, "task": {**tree["task"], "data": {**tree["task"]["data"], **made}}}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        return None, [*(_problem(each, Config, ()) for each in error.errors()), *problems]
    return (None if problems else config), problems


def section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of the section `name` of `model`, also of one that may be null; None where it is a value."""
    field = model.model_fields.get(name)
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def all_keys(model: type[BaseModel], above: str = "") -> list[str]:
    """Every key of `model` with those of its sections, dotted."""
    keys = []
    for name in model.model_fields:
        section = section_of(model, name)
        keys += all_keys(section, f"{above}{name}.") if section else [f"{above}{name}"]
    return keys


def dotted(path: Keys) -> str:
    """`("task", "evaluate", "questions", 2)` → `task.evaluate.questions[2]`."""
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in path).removeprefix(".")


def _check_options(data: dict[str, Any]) -> tuple[list[Problem], dict[str, Any]]:
    """What is wrong with keys of `task.data` that are not the schema's; and the options of its module, typed."""
    problems, made, module = list[Problem](), dict[str, Any](), data.get("module")
    for key in data.keys() - DataConfig.model_fields.keys():
        path = ("task", "data", key)
        model = None
        if key == module and key in tasks.having("options"):
            model = tasks.part_of(key, "options", "task.data.module").Options
        if model is None:
            is_other = key != module and key in tasks.having("options")
            says = f"{dotted(path)} is for task.data.module={key}, which is {module or 'null'} here"
            problems.append(Problem(path, says if is_other else _unknown(path, DataConfig)))
            continue
        try:
            made[key] = None if data[key] is None else model.model_validate(data[key])
        except ValidationError as error:
            problems += [_problem(each, model, path) for each in error.errors()]
    return problems, made


def _problem(error: Mapping[str, Any], model: type[BaseModel], above: Keys) -> Problem:
    path = (*above, *error["loc"])
    if error["type"] == "extra_forbidden":
        return Problem(path, _unknown(path, _model_at(model, error["loc"][:-1])))
    return Problem(path, sentence(dotted(path), error))


def _unknown(path: Keys, model: type[BaseModel]) -> str:
    """That the key at `path` is none, and which one may have been meant: a neighbour, or one of its name elsewhere."""
    *above, name = path
    near = [dotted((*above, each)) for each in model.model_fields if did_you_mean([str(name)], [each])]
    closest = did_you_mean([dotted(path)], near)
    if not closest:
        everywhere = {each.rpartition(".")[2]: each for each in all_keys(Config)}
        same = get_close_matches(str(name), everywhere, n=1, cutoff=0.8)
        closest = f"; did you mean {everywhere[same[0]]}?" if same else ""
    return f"unknown key {dotted(path)}{closest or '. Known: ' + ', '.join(model.model_fields)}"


def _model_at(model: type[BaseModel], path: Keys) -> type[BaseModel]:
    for name in path:
        model = section_of(model, str(name)) or model
    return model
