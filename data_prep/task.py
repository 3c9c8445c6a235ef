"""What data preparation asks of a task's YAML (`nemo_configs/task/*.yaml`), checked before any row is read."""

import difflib
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.configuration import plain
from core.errors import UserError
from core.prompt import Prompt
from core.tasks import part_of
from data_prep.split import ranges

RESERVED = ("row", "messages", "self")  # what a row, or a call of the prompt, has under these names is something else

_COMPARISON = re.compile(r"(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass
class Shares:
    validation: float = MISSING
    test: float = MISSING
    seed: int = 0


@dataclass
class Reviews:
    """What the module `reviews` asks of a task: the film's title, what it is, aspects of its own with their words."""

    title: str = MISSING
    kind: str = "film"
    aspects: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Data:
    """`task.data`, with the types that OmegaConf holds a user's overrides to; see task_defaults.yaml, slang.yaml."""

    source: str = MISSING
    module: str | None = None
    reviews: Reviews | None = None  # what the module of that name asks for
    columns: dict[str, list[str]] = MISSING
    required: list[str] = MISSING
    key: str = MISSING
    filters: dict[str, str] = field(default_factory=dict)
    split: Shares = MISSING
    max_chars: int = MISSING
    drop_explicit: bool = False
    train_fields: list[str] | None = None
    train_rows: int | None = None
    max_tokens: int | None = None  # tasks/chat/rows.py cuts dialogues that are longer


@dataclass(frozen=True)
class Filter:
    """What a cell must be for its row to stay: `>=3` compares numbers; else a regular expression for the whole cell."""

    rule: str

    def __post_init__(self) -> None:
        if self.rule.startswith((">", "<")) and not _COMPARISON.fullmatch(self.rule):
            raise ValueError(f"{self.rule!r} is no comparison: write >=, <=, > or < and a number")
        try:
            re.compile(self.rule)
        except re.error as error:
            raise ValueError(f"{self.rule!r} is no regular expression: {error}") from None

    def refuses(self, cell: str) -> str:
        """Why a row with this cell is left out, to be said after the column's name; "" where it stays."""
        if comparison := _COMPARISON.fullmatch(self.rule):
            sign, bound = comparison.groups()
            try:
                return "" if _COMPARE[sign](float(cell), float(bound)) else f"is not {self.rule}"
            except ValueError:
                return "is no number" if cell else "is empty"
        return "" if re.fullmatch(self.rule, cell) else f"does not match {self.rule}"


@dataclass(frozen=True)
class Task:
    """A task: which columns its rows have, which rows stay, and how they are worded.

    Attributes:
        data: its options; `required` begins with the key.
        filters: by column.
        split: the hashes `[first, past the last)` of each split, as in `split.py`.
    """

    name: str
    data: Data
    filters: dict[str, Filter]
    split: dict[str, tuple[int, int]]
    prompt: Prompt
    seed: int

    @property
    def meaning(self) -> list[int]:
        """The places, among the columns, of what is required beside the key: what a row says about it."""
        return [place for place, name in enumerate(self.data.columns) if name in self.data.required[1:]]

    @classmethod
    def of(cls, config: DictConfig) -> "Task":
        """Raises UserError: a field that is no column, shares that leave nothing to train on, a broken prompt."""
        data = _read_data(config.task.data)
        train_fields = data.train_fields or list(data.columns)
        data.required = list(dict.fromkeys([data.key, *data.required]))
        for option, named in {"required": data.required, "train_fields": train_fields, "filters": data.filters}.items():
            _check_names(f"task.data.{option}", named, data.columns)
        if lacking := [name for name in data.required if name not in train_fields]:
            raise UserError(f"task.data.train_fields leaves out {', '.join(lacking)}, which every row needs")
        module = part_of(data.module, "rows", "task.data.module") if data.module else None
        shares = data.split.validation, data.split.test
        if min(shares) <= 0 or sum(shares) >= 1:
            raise UserError(f"task.data.split: validation and test must be above 0 and below 1 together, not {shares}")
        if data.train_rows is not None and data.train_rows < 1:
            raise UserError(f"task.data.train_rows must be 1 or more, not {data.train_rows}")
        filters = {}
        for name, rule in data.filters.items():
            try:
                filters[name] = Filter(rule)
            except ValueError as error:
                raise UserError(f"task.data.filters.{name}: {error}") from None
        prompt = _read_prompt(plain(config.task.prompt))
        if not hasattr(module, "split_rows") and not hasattr(module, "make_rows"):  # the columns alone make a row
            _check_templates(prompt, data)
        return cls(config.task.name, data, filters, ranges(*shares), prompt, data.split.seed)


def _read_data(given: DictConfig) -> Data:
    _check_keys("task.data", given, Data)
    try:
        data: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Data), given))
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        raise UserError(f"task.data.{error.full_key}: {what}") from None
    assert isinstance(data, Data)
    return data


def _read_prompt(given: dict[str, Any]) -> Prompt:
    _check_keys("task.prompt", given, Prompt)
    if lacking := [name for name in ("template", "instruction", "response") if not isinstance(given.get(name), str)]:
        raise UserError(f"task.prompt has no {' and no '.join(lacking)}")
    for name, value in (given.get("fields") or {}).items():
        if not isinstance(value, str):
            raise UserError(f'task.prompt.fields.{name} is not text; write it in quotes: "{value}"')
    try:
        return Prompt(**given)
    except ValueError as error:
        raise UserError(f"task.prompt: {error}") from None


def _check_keys(section: str, given: Iterable[Any], kind: type) -> None:
    known = [each.name for each in fields(kind)]
    if unknown := [str(key) for key in given if key not in known]:
        raise UserError(
            f"{section} has no key {', '.join(unknown)}. Known: {', '.join(known)}{_did_you_mean(unknown, known)}"
        )


def _check_names(option: str, named: Iterable[str], columns: Iterable[str]) -> None:
    if unknown := [name for name in named if name not in columns]:
        hint = _did_you_mean(unknown, columns)
        raise UserError(f"{option} names {', '.join(unknown)}; the columns are {', '.join(columns)}{hint}")


def _check_templates(prompt: Prompt, data: Data) -> None:
    """A field that no row has would be empty in all of them, without a word."""
    for name in data.columns:
        if not re.fullmatch(r"\w+", name) or name in RESERVED:
            raise UserError(
                f"task.data.columns: a field cannot be called '{name}'. Use letters, digits and _, and "
                f"none of {', '.join(RESERVED)}; the header stands in the list after it"
            )
    known = [*data.columns, *prompt.fields]
    for option, template in {"instruction": prompt.instruction, "response": prompt.response}.items():
        for name in re.findall(r"\{([^{}]*)\}", template):
            # Braces around something that no field can be called, and that is not like one, are text.
            if name not in known and (re.fullmatch(r"\w+", name) or _did_you_mean([name], known)):
                _check_names(f"task.prompt.{option}", [name], known)
    if not any(f"{{{name}}}" in prompt.response for name in known):
        raise UserError(
            f"task.prompt.response names no column, so every row would have the same answer; write one of "
            f"{', '.join(f'{{{name}}}' for name in data.columns)} into it"
        )


def _did_you_mean(unknown: Iterable[str], known: Iterable[str]) -> str:
    plainly = {re.sub(r"\W+", "_", name).strip("_").casefold(): name for name in known}
    asked = [re.sub(r"\W+", "_", name).strip("_").casefold() for name in unknown]
    close = [match for name in asked for match in difflib.get_close_matches(name, plainly, n=1)]
    return f"; did you mean {', '.join(plainly[match] for match in close)}?" if close else ""
