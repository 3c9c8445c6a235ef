"""Prepares training data from a table: read, clean, merge, split, separate near-duplicates, write, report.

    python -m commands.data task=slang task.data.source=mine.csv

The result is a folder with `training.jsonl`, `validation.jsonl` and `test.jsonl` (one `{"input", "output", "row",
<columns>}` a line, not yet wrapped in the prompt's template), `dropped.jsonl` (every row left out, with its reason)
and `manifest.json` (what went in, what came out, hashes of both). It appears whole or not at all, and is not
rebuilt while source, task, seed and tokenizer stay the same.
"""

import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from core import artifacts
from core.artifacts import Manifest, Split
from core.configuration import plain
from core.errors import UserError
from core.progress import Progress
from core.schema import Config
from core.tasks import part_of
from data_prep.clean_text import is_explicit
from data_prep.data_folder import MANIFEST, building, read_manifest
from data_prep.read_cells import CellReader
from data_prep.read_table import Table
from data_prep.row_store import BATCH, Drop, RowStore, StoredRow, Unusable
from data_prep.show_rows import EXAMPLES, show
from data_prep.sources import LocalFile, Source, find_source, open_source
from data_prep.split import hash_of, seed_that_fills
from data_prep.task import Task
from data_prep.write_splits import SplitWriter

FORMAT = 5  # raise it when the same source would give other rows: existing folders are then rebuilt
DATABASE = "rows.sqlite"


def prepare(config: Config, tokenizer_file: Path | None, examples: int | None = None) -> Path:
    """Build the data folder `config.data_dir` of `config.task` unless it is up to date.

    Args:
        config: the resolved tree; `task` and `data_dir` are used.
        tokenizer_file: a `tokenizer.json` to count tokens with; None leaves the counts out.
        examples: how many rows to show; None shows some of a folder that was built, none of one that is up to date.

    Returns:
        The folder.

    Raises:
        UserError: the source is not a table or has too few rows, the task does not fit it, the disk is full.
            An existing data folder is then unchanged.
    """
    task, source = Task.of(config), find_source(config.task.data.source)
    folder = Path(config.data_dir)
    if isinstance(source, LocalFile) and source.path.absolute().is_relative_to(folder.absolute()):
        raise UserError(f"the source {source} lies in {folder}, which is replaced; move it elsewhere")
    try:
        hashes = {
            "source": source.version,
            "tokenizer": LocalFile(tokenizer_file).version if tokenizer_file else None,
        }
        options = plain(config.task.data) | {"source": source.name}
        made_of = [FORMAT, task.name, hashes, options, plain(config.task.prompt), task.seed]
        fingerprint = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        with building(folder, fingerprint) as partial:
            if partial is None:
                splits = read_manifest(folder).splits
                print(f"{folder} is up to date: {' / '.join(str(split.rows) for split in splits.values())} rows")
                if examples is not None:
                    show(folder, task.prompt, examples)
                return folder
            manifest = _fill(partial, task, source, tokenizer_file, fingerprint)
            manifest.tokenizer_sha256 = hashes["tokenizer"]
            manifest.write(partial / MANIFEST)
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"cannot prepare {folder}: {error}") from None
    show(folder, task.prompt, EXAMPLES if examples is None else examples)
    return folder


def _fill(partial: Path, task: Task, source: Source, tokenizer_file: Path | None, fingerprint: str) -> Manifest:
    """Write all files but the manifest into `partial`. Returns the manifest, without the tokenizer's hash."""
    # Imported here for numpy and RapidFuzz, which a folder that is up to date does not need.
    from data_prep.same_rows import merge_repeated, part_near_duplicates

    table = open_source(source, task.data.columns, [*task.data.required, *task.filters])
    store = RowStore(partial / DATABASE)
    try:
        reader = _reader(task, tokenizer_file)
        read, repaired = _read(table, task, source, reader, store)
        store.index()
        merged = merge_repeated(task, store, read)
        part_near_duplicates(task, store)
        if task.data.train_rows is not None:
            beyond = f"beyond train_rows: {task.data.train_rows}"
            for batch in store.beyond(*task.split["training"], task.data.train_rows):
                store.drop([Drop(entry.row, beyond, entry.key) for entry in batch])
        _check_sizes(task, source, store)
        splits = _write(partial, task, store, tokenizer_file)
        dropped = store.drop_counts()
    finally:
        table.close()
        store.close()
    (partial / DATABASE).unlink()
    return Manifest(
        task=task.name,
        fingerprint=fingerprint,
        source=artifacts.Source(
            **source.record(),
            form=table.form,
            encoding=table.encoding or None,
            columns=table.columns,
            unused=table.unused,
            notes=table.notes,
        ),
        rows_in=read,
        rows_out=sum(split.rows if split.source_rows is None else split.source_rows for split in splits.values()),
        dropped=dropped,
        merged=merged,
        repaired=repaired,
        notes=getattr(reader, "notes", {}),
        splits=splits,
        seed=task.seed,
    )


# --- read and clean -------------------------------------------------------------------------------------------


# Raw cells → the key, cleaned cells, and how many of them were repaired.
RowReader = Callable[[list[str]], tuple[str, list[str], int]]


def _reader(task: Task, tokenizer_file: Path | None) -> RowReader:
    """The reader of the task's module, or that of any table."""
    module = part_of(task.data.module, "rows", "task.data.module") if task.data.module else None
    made = getattr(module, "Reader", None)
    return made(task, tokenizer_file) if made else CellReader(task)


def _read(table: Table, task: Task, source: Source, reader: RowReader, store: RowStore) -> tuple[int, int]:
    """Put every row into `store`, cleaned or dropped. Returns the number of rows read and of cells repaired."""
    fields = list(task.data.columns)
    required = [fields.index(field) for field in task.data.required]
    number = repaired = 0
    entries: list[tuple[int, StoredRow]] = []
    drops: list[Drop] = []
    with Progress(f"Reading {source.name}", sum(file.stat().st_size for file in source.files)) as progress:
        for number, line, raw, problem in table.rows:
            if raw is None:
                drops.append(Drop(number, problem, line=line))
            else:
                try:
                    key, cells, changed = reader(raw)
                    repaired += changed
                    if reason := _unusable(task, cells, fields, required):
                        drops.append(Drop(number, reason, key[:100]))
                    else:
                        entries.append((hash_of(key, task.seed), StoredRow(number, key, cells)))
                except Unusable as why:
                    reason, detail = why.args
                    drops.append(Drop(number, reason, line=line, detail=detail))
            if number % BATCH == 0:
                store.add(entries)
                store.drop(drops)
                entries, drops = [], []
                progress.at(table.bytes_read())
        store.add(entries)
        store.drop(drops)
    return number, repaired


def _unusable(task: Task, cells: list[str], fields: list[str], required: list[int]) -> str:
    for place in required:
        if not cells[place]:
            return f"no {fields[place]}"
    for field, rule in task.filters.items():
        if reason := rule.refuses(cells[fields.index(field)]):
            return f"{field} {reason}"
    if sum(map(len, cells)) > task.data.max_chars:
        return f"longer than {task.data.max_chars} characters"
    if task.data.drop_explicit and is_explicit(" ".join(cells)):
        return "explicit term"
    return ""


# --- write ----------------------------------------------------------------------------------------------------


def _check_sizes(task: Task, source: Source, store: RowStore) -> None:
    """Raises UserError if a split is empty, and says what would fill it."""
    rows = {split: store.count(*ends) for split, ends in task.split.items()}
    usable, empty = sum(rows.values()), [split for split, count in rows.items() if count == 0]
    if not empty:
        return
    why = "".join(f"\n  {count} dropped: {reason}" for reason, count in store.drop_counts().items())
    if not usable:
        if first := next((drop for drop in store.drops() if drop.detail), None):
            why += f"\nThe first, line {first.line}: {first.in_words()}"
        raise UserError(f"{source} has no {'usable row:' + why if why else 'row below its header'}")
    shares = [end - first for first, end in task.split.values()]
    needed = math.ceil(math.log(100) * sum(shares) / min(shares))  # leaves the smallest split empty in one of 100 cases
    seed = None
    if usable <= 1000:
        all_of_them = store.batches(0, max(end for _, end in task.split.values()))
        seed = seed_that_fills([entry.key for batch in all_of_them for entry in batch], task.split)
    raise UserError(
        f"too few rows: {usable} of {source} can be used, and the {' and '.join(empty)} split got none.{why}\n"
        f"Rows are dealt by a hash of {' and '.join(task.data.key)}, so that none moves when others are added: about "
        f"{needed} rows fill all splits.\nAdd rows, raise the shares in task.data.split"
        + (f", or deal these rows another way: task.data.split.seed={seed}" if seed is not None else "")
    )


def _write(partial: Path, task: Task, store: RowStore, tokenizer_file: Path | None) -> dict[str, Split]:
    """Write the split files and `dropped.jsonl`. Returns the manifest's part on each split."""
    writer = SplitWriter(task, tokenizer_file)
    splits: dict[str, Split] = {}
    done = 0
    with Progress("Writing", store.count(0, max(end for _, end in task.split.values()))) as progress:

        def batches(split: str) -> Iterator[list[StoredRow]]:
            nonlocal done
            for batch in store.batches(*task.split[split]):
                yield batch
                done += len(batch)
                progress.at(done)

        fields = dict.fromkeys(task.split, task.data.columns) | {
            "training": task.data.train_fields or task.data.columns
        }
        from_all = writer.begin(partial, {split: (batches(split), fields[split]) for split in task.split})
        for split in task.split:
            splits[split] = writer.write(partial / f"{split}.jsonl", batches(split), fields[split])
            if from_all:
                splits[split].source_rows = store.count(*task.split[split])
    with (partial / "dropped.jsonl").open("w", encoding="utf-8") as file:
        for drop in store.drops():
            known = {name: value for name, value in drop._asdict().items() if value is not None}
            file.write(json.dumps(known, ensure_ascii=False) + "\n")
    return splits
