"""What data preparation asks of a task's YAML (`nemo_configs/task/*.yaml`), checked before any row is read."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.prompt import Prompt
from data_prep.split import ranges
from nemo_configs.command_line import UserError, plain

MODULES = ("slang", "reviews")  # see data_prep/write_splits.py


@dataclass
class Shares:
    validation: float = MISSING
    test: float = MISSING
    seed: int = 0


@dataclass
class Reviews:
    """What the module `reviews` asks of a task: the film, what it is called, and aspects of its own with their words."""

    title: str = MISSING
    kind: str = "film"
    aspects: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Data:
    """`task.data`, with the types that OmegaConf holds a user's overrides to; slang.yaml says what each is for."""

    source: str = MISSING
    module: str | None = None
    reviews: Reviews | None = None
    columns: dict[str, list[str]] = MISSING
    required: list[str] = MISSING
    key: str = MISSING
    split: Shares = MISSING
    max_chars: int = MISSING
    drop_explicit: bool = False
    train_fields: list[str] | None = None
    train_rows: int | None = None


@dataclass(frozen=True)
class Task:
    """A task, and where its rows come from.

    Attributes:
        data: its options; `required` begins with the key.
        split: the hashes `[first, past the last)` of each split, as in `split.py`.
    """

    name: str
    data: Data
    split: dict[str, tuple[int, int]]
    prompt: Prompt
    seed: int

    @property
    def source(self) -> Path:
        return Path(self.data.source).expanduser()

    @property
    def meaning(self) -> list[int]:
        """The places, among the columns, of what is required beside the key: what a row says about it."""
        return [place for place, field in enumerate(self.data.columns) if field in self.data.required[1:]]

    @classmethod
    def of(cls, config: DictConfig) -> "Task":
        """Raises UserError: a field that is no column, shares that leave nothing to train on, a broken prompt."""
        data = _read_data(config.task.data)
        train_fields = data.train_fields or list(data.columns)
        data.required = list(dict.fromkeys([data.key, *data.required]))
        for option, named in {"required": data.required, "train_fields": train_fields}.items():
            if unknown := [field for field in named if field not in data.columns]:
                known = ", ".join(data.columns)
                raise UserError(f"task.data.{option} names {', '.join(unknown)}; the columns are {known}")
        if lacking := [field for field in data.required if field not in train_fields]:
            raise UserError(f"task.data.train_fields leaves out {', '.join(lacking)}, which every row needs")
        if data.module not in (None, *MODULES):
            raise UserError(f"task.data.module={data.module} is unknown. Known: {', '.join(MODULES)}, null")
        shares = data.split.validation, data.split.test
        if min(shares) <= 0 or sum(shares) >= 1:
            raise UserError(f"task.data.split: validation and test must be above 0 and below 1 together, not {shares}")
        if data.train_rows is not None and data.train_rows < 1:
            raise UserError(f"task.data.train_rows must be 1 or more, not {data.train_rows}")
        try:
            prompt = Prompt(**plain(config.task.prompt))
        except ValueError as error:
            raise UserError(f"task.prompt: {error}") from None
        return cls(config.task.name, data, ranges(*shares), prompt, data.split.seed)


def _read_data(given: DictConfig) -> Data:
    known: dict[str, Any] = {field.name: given[field.name] for field in fields(Data) if field.name in given}
    try:
        data: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Data), known))
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        raise UserError(f"task.data.{error.full_key}: {what}") from None
    assert isinstance(data, Data)
    return data
