"""Writes the YAML file of a new task from a profile of the user's table.

`nemo_configs/task/films.yaml` works as it is, and says in its comments what may be changed; it is made from the
template `new_task.yaml.j2`.

A task folder may claim tables that its code can read. Its part `tasks/<name>/new_task.py` holds

    claim(profile, general, file_name, title) -> TableKind | None

which is called with the table's profile, the kind that its headers suggest (None where no column is text), the file's
name and the user's title. The `TableKind` that it returns may name a template beside it, which extends
"new_task.yaml.j2" and fills its blocks `title`, `module`, `key` and `prompt`.
"""

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.text import Text

from core import configuration
from core.configuration import escaped, load_config, names
from core.errors import UserError
from core.files import write_whole
from core.tasks import folders
from data_prep.prepare import prepare
from data_prep.profile_table import ABOUT, TableProfile, called, field_of, profile_table, show_profile
from data_prep.read_cells import key_of_fields
from data_prep.show_rows import plain_console
from data_prep.sources import HubTable, find_source
from data_prep.split import hash_of, ranges, seed_that_fills
from data_prep.table_kind import RATINGS, TableKind, kind_of
from data_prep.task import Task

FEWEST = 10  # rows, so that some can be held out
FEW = 200  # rows; of fewer, a tenth is too little to measure with
PREVIEWED = 3  # rows
# Steps of 16 rows by which few labels were told apart; after six, one was named for every text.
STEPS, BATCH, MOST_EPOCHS = 36, 16, 20
KEYWORDS = ("yes", "no", "on", "off", "true", "false", "null", "nan", "inf")  # of YAML, which are not read as text


def new_task(
    name: str, source_text: str, title: str = "", asked: str = "", answer: str = "", preview: bool = False
) -> Path:
    """Write `nemo_configs/task/<name>.yaml` for a table, and print its profile and what was decided.

    Args:
        source_text: as `SOURCE`, see `sources.py`.
        title: what the rows are about, for tasks that ask for it, such as the film that was reviewed.
        asked, answer: headers of the columns that are asked and answered; "" to go by what the table looks like.
        preview: show rows as they would be, and write nothing.

    Raises:
        UserError: the name is invalid or taken, the source cannot be read or holds nothing to learn, or it is not clear
            what is asked.
    """
    file = configuration.CONFIG_DIR / "task" / f"{name}.yaml"
    if not name:
        raise UserError("the new task needs a name, such as NAME=films")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name.lower() in KEYWORDS:
        raise UserError(f"a task cannot be called '{name}'. Use letters, digits and _, such as NAME=films")
    if name in names("task"):
        raise UserError(f"there is a task {name} already, in {file}. Give another NAME, or delete that file")
    if not source_text:
        raise UserError("the new task needs a table, such as SOURCE=reviews.csv")
    source = find_source(source_text)
    profile = profile_table(source)
    console = plain_console()
    show_profile(profile, source, console)
    if profile.rows < FEWEST:
        rows = f"{profile.rows} row{'s' * (profile.rows != 1)}"
        raise UserError(f"{source} has {rows}; at least {FEWEST} are needed for training and evaluation")
    file_name = Path(source.name).name.partition(":")[0]  # of hf:OWNER/NAME:train the NAME
    kind = kind_of(profile, file_name, title, asked, answer)
    if isinstance(source, HubTable):
        source = source.pinned()
    text = _write(kind, profile, name, str(source))
    _tell(kind, profile, file.name, console)
    if preview:
        _preview(text, name)
        console.print("\nNothing was written; the same command without PREVIEW writes the task.", soft_wrap=True)
        return file
    write_whole(file, text)
    try:
        Task.of(load_config([f"task={name}"]))
    except BaseException:
        file.unlink()
        raise
    console.print(
        f"\nWrote nemo_configs/task/{file.name}. Next, look at the rows:\n\n  make data TASK={name}", soft_wrap=True
    )
    return file


def _tell(kind: TableKind, profile: TableProfile, file: str, console: Console) -> None:
    """Print what was guessed, why, and how to change it, in five lines."""

    def named(fields: Iterable[str]) -> str:
        return ", ".join(f"'{kind.columns[field].header}'" for field in fields)

    learned = [field for field in kind.columns if field not in kind.given]
    unused = [column for column in profile.columns if column not in kind.columns.values() and column.filled]
    lines = {
        "Guessed": kind.about,
        "Because": kind.why or f"the columns are called so: {named(kind.columns)}",
        "Columns": f"given {named(kind.given) or 'none'}; learned {named(learned)}",
        "Not used": ", ".join(f"{column.header} ({column.holds})" for column in unused) or "none",
        "Change it": f"in nemo_configs/task/{file}, whose comments say how; or name two columns: ASKED=… ANSWER=…",
    }
    for title, says in lines.items():
        console.print(Text.assemble((f"{title:11}", "bold"), " ".join(says.split())), soft_wrap=True)


def _preview(text: str, name: str) -> None:
    """Prepare the table in a folder that is then removed, and show rows as the model would read them.

    Raises:
        UserError: as `prepare`.
    """
    with TemporaryDirectory() as folder:
        # A home of tasks outside this repository, see core/tasks.py.
        (Path(folder) / "tasks").mkdir()
        task_file = Path(folder) / "nemo_configs" / "task" / f"{name}.yaml"
        task_file.parent.mkdir(parents=True)
        task_file.write_text(text, encoding="utf-8")
        sys.path.append(folder)
        try:
            config = load_config([f"task={name}", f"data_dir={folder}/data"])
            prepare(config, None, PREVIEWED)
        finally:
            sys.path.remove(folder)


def _write(kind: TableKind, profile: TableProfile, name: str, source: str) -> str:
    """The task's file."""
    keys, used = [kind.columns[field] for field in kind.key], list(kind.columns.values())
    rows = enumerate(zip(*(column.cells for column in keys), strict=True))
    places = {key_of_fields(cells): place for place, cells in reversed(list(rows)) if cells[0]}
    if len(places) < FEWEST:
        headers = " and ".join(f"'{column.header}'" for column in keys)
        raise UserError(
            f"only {len(places)} of the rows differ in {headers}, which identifies a row; at least {FEWEST} are needed"
        )
    shares = (0.1, 0.1) if len(places) >= FEW else (0.2, 0.2)
    seed = (seed_that_fills(list(places), ranges(*shares)) or 0) if len(places) < 1000 and profile.is_whole else 0
    first, end = ranges(*shares)["test"]
    held_out = next((place for text, place in places.items() if first <= hash_of(text, seed) < end), 0)
    # Limits that all but one row in a hundred keep, so that long rows are not dropped unnoticed.
    lengths = sorted(map(len, map("".join, zip(*(column.cells for column in used), strict=True))))
    characters = lengths[int(0.99 * len(lengths))]
    tokens = int((characters + len(kind.instruction)) / 3) + 30
    numbers = [column for column in profile.columns if column.holds == "numbers" and not ABOUT & set(column.words)]
    to_filter = [field_of(column) for column in (called(RATINGS, numbers) or numbers)[:1]]
    words: dict[str, Any] = {
        "name": name,
        "source": source,
        "file_name": Path(source).name,
        "rows": f"{profile.rows:,}",
        "kind": kind,
        "unused": {field_of(column): column for column in profile.columns if column not in used and column.filled},
        "filter": (to_filter[0], ">=3") if to_filter else (kind.key[0], ".{20,}"),
        "shares": shares,
        "seed": seed,
        "max_chars": round(characters + 500, -3) if characters > 4000 else 4000,
        "max_length": min(1 << tokens.bit_length(), 4096) if tokens > 512 else 512,
        "examples": {field: kind.columns[field].cells[held_out] for field in kind.given},
        "is_labels": False,
        "epochs": min(math.ceil(STEPS * BATCH / (len(places) * (1 - sum(shares)))), MOST_EPOCHS),
        **kind.values,
    }
    template = Environment(
        loader=FileSystemLoader([Path(__file__).parent, *folders()]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template.filters["text"] = _text
    return template.get_template(kind.template).render(words)


def _text(value: str) -> str:
    """YAML for this text, whatever it contains; quoted if YAML would not read it as text."""
    if re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_ ./-]*[A-Za-z0-9_]", value) and value.lower() not in KEYWORDS:
        return value
    value = escaped(value)  # "${" would be the name of another key
    if '"' in value and not set(value) & set("'\\\n"):
        return f"'{value}'"
    return json.dumps(value, ensure_ascii=False)
