"""Reads a source into the row store, cleaned or dropped with a reason: in this process, or by all cores in parts.

A part is a file of the source, or every n-th block of rows of a file that is large beside the others; each of its n
readers then parses the whole file, which costs a tenth of what cleaning does. It is a row store of its own, whose rows
are numbered in the file. It is kept until all rows are gathered, so that the next command need not read it again if
this one is killed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from core.files import read_json, sync, write_json
from core.progress import Progress
from core.tasks import part_of
from data_prep.clean_text import is_explicit
from data_prep.read_cells import CellReader
from data_prep.read_table import Names, Table, open_table
from data_prep.row_store import BATCH, LETTERS, Drop, RowStore, StoredRow, Unusable
from data_prep.sources import LocalFiles, Source, open_source
from data_prep.split import hash_of
from data_prep.task import Task
from data_prep.work_folder import WorkFolder
from data_prep.workers import advance

UNITS = 4  # parts for each core, at least, if the files are large: cores then end at about the same time

# Raw cells → the key, cleaned cells, and how many of them were repaired.
RowReader = Callable[[list[str]], tuple[str, list[str], int]]


@dataclass
class Reading:
    """What was read: rows, repaired cells, what the task's reader counted, and as what the file was understood."""

    rows: int = 0
    repaired: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    form: str = ""
    encoding: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, table: Table) -> "Reading":
        return cls(
            form=table.form, encoding=table.encoding, columns=table.columns, unused=table.unused, remarks=table.notes
        )


@dataclass(frozen=True)
class Part:
    """The rows of `file` in every block whose number, modulo `parts`, is `part`; the other fields are as in `read`."""

    task: Task
    tokenizer_file: Path | None
    file: Path
    names: Names
    store: Path
    part: int
    parts: int


def read(task: Task, source: Source, tokenizer_file: Path | None, store: RowStore) -> Reading:
    """Read all rows in this process."""
    table = open_source(source, task.data.columns, required_of(task), plain_text_of(task))
    reading = Reading.of(table)
    with Progress(f"Reading {source.name}", sum(file.stat().st_size for file in source.files)) as progress:
        try:
            _read_into(store, table, task, tokenizer_file, reading, lambda: progress.at(table.bytes_read()))
        finally:
            table.close()
    return _with_remarks(reading, source)


def read_by_parts(
    task: Task, source: Source, tokenizer_file: Path | None, store: RowStore, at_work: WorkFolder
) -> Reading:
    """The same by all cores; the parts are in the work folder, also those that an earlier process has left there."""
    parts = _parts(task, source, tokenizer_file, at_work.path, at_work.workers.count)
    missing = [part for part in parts if not _about(part.store).exists()]
    size = sum(part.file.stat().st_size // part.parts for part in missing)
    if len(missing) < len(parts):
        print(f"{len(parts) - len(missing)} of {len(parts)} parts of {source} were read before", flush=True)
    whole, notes, above = Reading(), Counter[str](), 0
    with Progress(f"Reading {source.name}", size) as progress:
        read_now = at_work.workers.map(read_part, missing, progress)
        for part in parts:
            if part in missing:
                next(read_now)
            reading = Reading(**read_json(_about(part.store)))
            if not whole.columns:
                whole = replace(reading, repaired=0)
            store.take_in(part.store, above)
            whole.repaired += reading.repaired
            notes.update(reading.notes)
            if part.part == part.parts - 1:
                above += reading.rows
    whole.rows, whole.notes = above, dict(notes)
    return _with_remarks(whole, source)


def _with_remarks(reading: Reading, source: Source) -> Reading:
    if isinstance(source, LocalFiles):
        reading.remarks = [*source.notes, *reading.remarks]
    return reading


def _parts(task: Task, source: Source, tokenizer_file: Path | None, folder: Path, cores: int) -> list[Part]:
    """The parts of each file; of one that another command has begun those that it made, on however many cores."""
    begun = {path.stem.split("-")[1]: int(path.stem.split("-")[-1]) for path in folder.glob("part-*.json")}
    sizes = [file.stat().st_size for file in source.files]
    unit = max(sum(sizes) / (UNITS * cores), 1)
    parts = []
    for number, (file, size) in enumerate(zip(source.files, sizes, strict=True)):
        count = begun.get(f"{number:06}") or min(cores, max(1, round(size / unit)))
        for part in range(count):
            store = folder / f"part-{number:06}-{part}-of-{count}.sqlite"
            parts.append(Part(task, tokenizer_file, file, task.data.columns, store, part, count))
    return parts


def read_part(part: Part) -> None:
    """Read a part into its store, beside which a file of JSON says what was read; that file comes last."""
    task, done = part.task, 0
    part.store.unlink(missing_ok=True)
    table = open_table(part.file, part.names, required_of(task), plain_text_of(task))
    store, reading = RowStore(part.store), Reading.of(table)

    def seen() -> None:
        nonlocal done
        now = table.bytes_read() // part.parts
        advance(now - done)
        done = now

    try:
        _read_into(store, table, task, part.tokenizer_file, reading, seen, part.part, part.parts)
        store.commit()
    finally:
        table.close()
        store.close()
    sync(part.store)
    write_json(_about(part.store), asdict(reading))


def _about(store: Path) -> Path:
    return store.with_suffix(".json")


def _read_into(
    store: RowStore,
    table: Table,
    task: Task,
    tokenizer_file: Path | None,
    reading: Reading,
    seen: Callable[[], None],
    part: int = 0,
    parts: int = 1,
) -> None:
    """Put the rows of a table, or those of one of its `parts`, into `store`, and count them in `reading`."""
    reader = _reader(task, tokenizer_file)
    unusable = _unusable(task)
    entries: list[tuple[int, StoredRow]] = []
    drops: list[Drop] = []
    number = letters = 0
    for number, line, raw, problem in table.rows:
        if number % BATCH == 0 or letters > LETTERS:
            store.add(entries)
            store.drop(drops)
            entries, drops, letters = [], [], 0
            seen()
        if parts > 1 and number // BATCH % parts != part:
            continue
        if raw is None:
            drops.append(Drop(number, problem, line=line))
            continue
        try:
            key, cells, changed = reader(raw)
            reading.repaired += changed
            if reason := unusable(cells):
                drops.append(Drop(number, reason, key[:100]))
            else:
                entries.append((hash_of(key, task.seed), StoredRow(number, key, cells)))
                letters += sum(map(len, cells))
        except Unusable as why:
            reason, detail = why.args
            drops.append(Drop(number, reason, line=line, detail=detail))
    store.add(entries)
    store.drop(drops)
    seen()
    reading.rows, reading.notes = number, dict(getattr(reader, "notes", {}))


def required_of(task: Task) -> list[str]:
    """The fields that the source must have."""
    return [*task.data.required, *task.filters]


def plain_text_of(task: Task) -> str:
    """The field that files of plain text are read into; "" where the task reads tables alone."""
    module = part_of(task.data.module, "rows", "task.data.module") if task.data.module else None
    return getattr(module, "PLAIN_TEXT", "")


def _reader(task: Task, tokenizer_file: Path | None) -> RowReader:
    """The reader of the task's module, or that of any table."""
    module = part_of(task.data.module, "rows", "task.data.module") if task.data.module else None
    made = getattr(module, "Reader", None)
    return made(task, tokenizer_file) if made else CellReader(task)


def _unusable(task: Task) -> Callable[[Sequence[str]], str]:
    """Says why a row's cleaned cells cannot be used; "" if they can."""
    fields, most, drops_explicit = list(task.data.columns), task.data.max_chars, task.data.drop_explicit
    required = [(fields.index(name), f"no {name}") for name in task.data.required]
    filters = [(fields.index(name), name, rule) for name, rule in task.filters.items()]

    def unusable(cells: Sequence[str]) -> str:
        for place, reason in required:
            if not cells[place]:
                return reason
        for place, name, rule in filters:
            if reason := rule.refuses(cells[place]):
                return f"{name} {reason}"
        if sum(map(len, cells)) > most:
            return f"longer than {most} characters"
        return "explicit term" if drops_explicit and is_explicit(" ".join(cells)) else ""

    return unusable
