"""A starter for a task of the user's own, from a look at the table.

`nemo_configs/task/films.yaml` works as it is, and says in its comments what may be changed; its words are in
`new_task.yaml.j2`.
"""

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from core import configuration
from core.configuration import load_config, names
from core.errors import UserError
from core.files import write_whole
from data_prep.clean_text import key_of
from data_prep.look_at_table import ABOUT, Look, look_at, show
from data_prep.show_rows import plain_console
from data_prep.sources import HubTable, find_source
from data_prep.split import hash_of, ranges, seed_that_fills
from data_prep.table_kind import RATINGS, Kind, called, field_of, kind_of
from data_prep.task import Task

FEWEST = 10  # rows, of which some can be held out
FEW = 200  # rows, of which a tenth is too little to measure with
WORDS = ("yes", "no", "on", "off", "true", "false", "null", "nan", "inf")  # that are more than text in YAML


def new_task(name: str, source_text: str, title: str = "") -> Path:
    """Write `nemo_configs/task/<name>.yaml` for a table, and print what was seen and decided.

    Args:
        source_text: as `SOURCE`, see `sources.py`.
        title: what the reviews are of, where the table holds reviews.

    Raises:
        UserError: a name that cannot be one or is taken, a source that cannot be read or is of no use.
    """
    file = configuration.CONFIG_DIR / "task" / f"{name}.yaml"
    if not name:
        raise UserError("what is the task to be called? Give it a name, such as NAME=films")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name.lower() in WORDS:
        raise UserError(f"a task cannot be called '{name}'. Use letters, digits and _, such as NAME=films")
    if name in names("task"):
        raise UserError(f"there is a task {name} already, in {file}. Give another NAME, or delete that file")
    if not source_text:
        raise UserError("of which table? Give it as SOURCE=reviews.csv")
    source = find_source(source_text)
    look = look_at(source)
    console = plain_console()
    show(look, source, console)
    if look.rows < FEWEST:
        rows = f"{look.rows} row{'s' * (look.rows != 1)}"
        raise UserError(
            f"{source} has {rows}; at least {FEWEST} are needed, to learn from most of them and measure with the rest"
        )
    kind = kind_of(look, Path(source.name).name.partition(":")[0], title)  # of hf:OWNER/NAME:train the NAME
    if isinstance(source, HubTable):
        source = source.pinned()
    write_whole(file, _write(kind, look, name, str(source)))
    try:
        Task.of(load_config([f"task={name}"]))
    except BaseException:
        file.unlink()
        raise
    console.print(
        f"{kind.about}\n\nWrote nemo_configs/task/{file.name}; its comments say what may be changed. Now "
        f"look at the rows:\n\n  make data TASK={name}",
        soft_wrap=True,
    )
    return file


def _write(kind: Kind, look: Look, name: str, source: str) -> str:
    """The task's file."""
    key, used = kind.columns[kind.key], list(kind.columns.values())
    places = {key_of(cell): place for place, cell in reversed(list(enumerate(key.cells))) if cell}
    if len(places) < FEWEST:
        raise UserError(
            f"only {len(places)} of the rows differ in '{key.header}', by which rows are known; at least "
            f"{FEWEST} are needed"
        )
    shares = (0.1, 0.1) if len(places) >= FEW else (0.2, 0.2)
    seed = (seed_that_fills(list(places), ranges(*shares)) or 0) if len(places) < 1000 and look.is_whole else 0
    first, end = ranges(*shares)["test"]
    held_out = next((place for text, place in places.items() if first <= hash_of(text, seed) < end), 0)
    # Long rows are not left out unseen: limits that all but one in a hundred of them keep.
    lengths = sorted(map(len, map("".join, zip(*(column.cells for column in used), strict=True))))
    characters = lengths[int(0.99 * len(lengths))]
    tokens = int((characters + len(kind.instruction)) / 3) + 30
    numbers = [column for column in look.columns if column.holds == "numbers" and not ABOUT & set(column.words)]
    to_filter = [field_of(column) for column in (called(RATINGS, numbers) or numbers)[:1]]
    words: dict[str, Any] = {
        "name": name,
        "source": source,
        "file_name": Path(source).name,
        "rows": f"{look.rows:,}",
        "kind": kind,
        "unused": {field_of(column): column for column in look.columns if column not in used and column.filled},
        "filter": (to_filter[0], ">=3") if to_filter else (kind.key, ".{20,}"),
        "shares": shares,
        "seed": seed,
        "max_chars": round(characters + 500, -3) if characters > 4000 else 4000,
        "max_length": min(1 << tokens.bit_length(), 4096) if tokens > 512 else 512,
        "examples": {field: kind.columns[field].cells[held_out] for field in kind.given},
    }
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template.filters["text"] = _text
    return template.get_template("new_task.yaml.j2").render(words)


def _text(value: str) -> str:
    """YAML for this text, whatever is in it: in quotes where a plain word could be taken for more."""
    if re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_ ./-]*[A-Za-z0-9_]", value) and value.lower() not in WORDS:
        return value
    value = value.replace("${", "$ {")  # which OmegaConf would take for the name of another key
    if '"' in value and not set(value) & set("'\\\n"):
        return f"'{value}'"
    return json.dumps(value, ensure_ascii=False)
