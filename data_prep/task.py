"""What data preparation asks of a task's YAML (`nemo_configs/task/*.yaml`), checked before any row is read."""

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.configuration import plain
from core.errors import UserError
from core.prompt import Prompt
from core.schema import Config, DataConfig, PromptConfig
from core.tasks import part_of
from core.validation import did_you_mean
from data_prep.split import ranges

RESERVED = ("row", "messages", "self")  # what a row, or a call of the prompt, has under these names is something else

_COMPARISON = re.compile(r"(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


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
        data: its options; `required` begins with the key, or the first field of it.
        filters: by column.
        split: the hashes `[first, past the last)` of each split, as in `split.py`.
    """

    name: str
    data: DataConfig
    filters: dict[str, Filter]
    split: dict[str, tuple[int, int]]
    prompt: Prompt
    seed: int

    @property
    def all_hashes(self) -> tuple[int, int]:
        """`[first, past the last)` of the hashes of all splits."""
        return min(first for first, _ in self.split.values()), max(end for _, end in self.split.values())

    @property
    def meaning(self) -> list[int]:
        """The places, among the columns, of what is required beside the key: what a row says about it."""
        said = set(self.data.required) - set(self.data.key)
        return [place for place, name in enumerate(self.data.columns) if name in said]

    @property
    def asked(self) -> list[int]:
        """The places of the fields that are the key together."""
        return [list(self.data.columns).index(name) for name in self.data.key]

    @classmethod
    def of(cls, config: Config) -> "Task":
        """Raises UserError: a field that is no column, shares that leave nothing to train on, a broken prompt."""
        data = config.task.data
        train_fields = data.train_fields or list(data.columns)
        data = data.model_copy(update={"required": list(dict.fromkeys([data.key[0], *data.required]))})
        for option, named in {
            "required": data.required,
            "key": data.key,
            "train_fields": train_fields,
            "filters": data.filters,
            "cells": data.cells,
        }.items():
            _check_names(f"task.data.{option}", named, data.columns)
        if lacking := [name for name in data.required if name not in train_fields]:
            raise UserError(f"task.data.train_fields leaves out {', '.join(lacking)}, which every row needs")
        module = part_of(data.module, "rows", "task.data.module") if data.module else None
        shares = data.split.validation, data.split.test
        if sum(shares) >= 1:
            raise UserError(f"task.data.split: validation and test must be below 1 together, not {shares}")
        filters = {}
        for name, rule in data.filters.items():
            try:
                filters[name] = Filter(rule)
            except ValueError as error:
                raise UserError(f"task.data.filters.{name}: {error}") from None
        prompt = _read_prompt(config.task.prompt)
        if not hasattr(module, "split_rows") and not hasattr(module, "make_rows"):  # the columns alone make a row
            _check_templates(prompt, data)
        return cls(config.task.name, data, filters, ranges(*shares), prompt, data.split.seed)


def _read_prompt(given: PromptConfig) -> Prompt:
    try:
        return Prompt(**plain(given))
    except ValueError as error:
        raise UserError(f"task.prompt: {error}") from None


def _check_names(option: str, named: Iterable[str], columns: Iterable[str]) -> None:
    if unknown := [name for name in named if name not in columns]:
        hint = did_you_mean(unknown, columns)
        raise UserError(f"{option} names {', '.join(unknown)}; the columns are {', '.join(columns)}{hint}")


def _check_templates(prompt: Prompt, data: DataConfig) -> None:
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
            if name not in known and (re.fullmatch(r"\w+", name) or did_you_mean([name], known)):
                _check_names(f"task.prompt.{option}", [name], known)
    if not any(f"{{{name}}}" in prompt.response for name in known):
        raise UserError(
            f"task.prompt.response names no column, so every row would have the same answer; write one of "
            f"{', '.join(f'{{{name}}}' for name in data.columns)} into it"
        )
