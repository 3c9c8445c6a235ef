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
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from core import artifacts
from core.artifacts import Alike, Manifest, Split
from core.configuration import plain
from core.errors import UserError
from core.progress import Progress
from core.schema import Config
from data_prep.data_folder import MANIFEST, building, read_manifest
from data_prep.read_rows import Reading, read, read_by_parts
from data_prep.row_store import Drop, RowStore, StoredRow
from data_prep.show_rows import EXAMPLES, show
from data_prep.sources import HubTable, LocalFile, Source, find_source
from data_prep.split import seed_that_fills
from data_prep.task import Task
from data_prep.work_folder import WorkFolder, remove_work, work_folder
from data_prep.workers import advance
from data_prep.write_splits import SplitWriter

FORMAT = 6  # raise it when the same source would give other rows or files: existing folders are then rebuilt
DATABASE = "rows.sqlite"
LARGE = 64 << 20  # bytes of a source from which on all cores are used, which takes a second to begin


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
    local = not isinstance(source, HubTable)
    if local and any(path.absolute().is_relative_to(folder.absolute()) for path in source.files):
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
            manifest = _fill(partial, task, source, tokenizer_file, fingerprint, folder)
            manifest.tokenizer_sha256 = hashes["tokenizer"]
            manifest.write(partial / MANIFEST)
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"cannot prepare {folder}: {error}") from None
    remove_work(folder)
    show(folder, task.prompt, EXAMPLES if examples is None else examples)
    return folder


def _fill(
    partial: Path, task: Task, source: Source, tokenizer_file: Path | None, fingerprint: str, folder: Path
) -> Manifest:
    """Write all files but the manifest into `partial`. Returns the manifest, without the tokenizer's hash."""
    is_large = sum(file.stat().st_size for file in source.files if file.is_file()) >= LARGE
    with work_folder(folder, fingerprint) if is_large else nullcontext() as at_work:
        path = at_work.store if at_work else partial / DATABASE
        kept = at_work.gathered() if at_work else None
        if not kept:
            path.unlink(missing_ok=True)
        store = RowStore(path, is_made=bool(kept))
        try:
            if kept:
                print(f"The rows of {source} were gathered before", flush=True)
                reading, alike = Reading(**kept["reading"]), Alike(**kept["alike"])
            else:
                reading, alike = _gather(task, source, tokenizer_file, store, at_work)
            _check_sizes(task, source, store, alike)
            splits, carried = _write(partial, task, store, tokenizer_file, at_work)
            dropped = store.drop_counts()
        finally:
            store.close()
    if not at_work:
        path.unlink()
    return Manifest(
        task=task.name,
        fingerprint=fingerprint,
        source=artifacts.Source(
            **source.record(),
            form=reading.form,
            encoding=reading.encoding or None,
            columns=reading.columns,
            unused=reading.unused,
            notes=reading.remarks,
        ),
        rows_in=reading.rows,
        rows_out=sum(split.rows if split.source_rows is None else split.source_rows for split in splits.values()),
        dropped=dropped,
        merged=alike.repeats + alike.joined,
        alike=alike,
        repaired=reading.repaired,
        notes=reading.notes,
        splits=splits,
        carried=carried,
        seed=task.seed,
    )


def _gather(
    task: Task, source: Source, tokenizer_file: Path | None, store: RowStore, at_work: WorkFolder | None
) -> tuple[Reading, Alike]:
    """Read, merge and group all rows in `store`."""
    # Imported here for numpy and RapidFuzz, which a folder that is up to date does not need.
    from data_prep.near_groups import group_near_duplicates
    from data_prep.same_rows import merge_repeated

    if at_work:
        reading = read_by_parts(task, source, tokenizer_file, store, at_work)
    else:
        reading = read(task, source, tokenizer_file, store)
    store.index()
    alike = merge_repeated(task, store, reading.rows)
    group_near_duplicates(task, store, alike, at_work)
    if task.data.train_rows is not None:
        beyond = f"beyond train_rows: {task.data.train_rows}"
        for batch in store.beyond(*task.split["training"], task.data.train_rows):
            store.drop([Drop(entry.row, beyond, entry.key) for entry in batch])
    if at_work:
        at_work.keep(store, {"reading": asdict(reading), "alike": alike.to_dict()})
    return reading, alike


# --- write ----------------------------------------------------------------------------------------------------


def _check_sizes(task: Task, source: Source, store: RowStore, alike: Alike) -> None:
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
    if 2 * alike.largest_group > usable:
        raise UserError(
            f"{alike.largest_group} of the {usable} usable rows of {source} are one group of near-duplicates, which "
            f"stays in one split, and the {' and '.join(empty)} split got none.{why}\n"
            "A model that has learned some of them has in effect seen the others, so that nothing would be left to "
            "measure it with. Add rows of other kinds"
        )
    shares = [end - first for first, end in task.split.values()]
    needed = math.ceil(math.log(100) * sum(shares) / min(shares))  # leaves the smallest split empty in one of 100 cases
    seed = None
    if usable <= 1000:
        all_of_them = store.batches(*task.all_hashes)
        seed = seed_that_fills([entry.key for batch in all_of_them for entry in batch], task.split)
    raise UserError(
        f"too few rows: {usable} of {source} can be used, and the {' and '.join(empty)} split got none.{why}\n"
        f"Rows are dealt by a hash of {' and '.join(task.data.key)}, so that none moves when others are added: about "
        f"{needed} rows fill all splits.\nAdd rows, raise the shares in task.data.split"
        + (f", or deal these rows another way: task.data.split.seed={seed}" if seed is not None else "")
    )


def _write(
    partial: Path, task: Task, store: RowStore, tokenizer_file: Path | None, at_work: WorkFolder | None
) -> tuple[dict[str, Split], list[str]]:
    """Write the split files, `dropped.jsonl` and the module's own. Returns the manifest's part on each split, and which
    files runs carry."""
    writer = SplitWriter(task, tokenizer_file)
    fields = {split: list(task.data.columns) for split in task.split}
    fields["training"] = task.data.train_fields or fields["training"]
    if at_work and writer.is_row_by_row:
        splits = _write_by_parts(partial, task, store, writer, fields, at_work)
    else:
        splits = _write_here(partial, task, store, writer, fields)
    with (partial / "dropped.jsonl").open("w", encoding="utf-8") as file:
        for drop in store.drops():
            known = {name: value for name, value in drop._asdict().items() if value is not None}
            file.write(json.dumps(known, ensure_ascii=False) + "\n")
    return splits, writer.finish(partial)


def _write_here(
    partial: Path, task: Task, store: RowStore, writer: SplitWriter, fields: dict[str, list[str]]
) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    done = 0
    with Progress("Writing", store.count(*task.all_hashes)) as progress:

        def batches(split: str) -> Iterator[list[StoredRow]]:
            nonlocal done
            for batch in store.batches(*task.split[split]):
                yield batch
                done += len(batch)
                progress.at(done)

        from_all = writer.begin(partial, {split: (batches(split), fields[split]) for split in task.split})
        for split in task.split:
            splits[split] = writer.write(partial / f"{split}.jsonl", batches(split), fields[split])
            if from_all:
                splits[split].source_rows = store.count(*task.split[split])
    return splits


class Range(NamedTuple):
    """Rows to write: those numbered above the one, up to the other; the files of all splits begin with `file`."""

    task: Task
    store: Path
    fields: dict[str, list[str]]
    above: int
    last: int
    file: Path


def _write_by_parts(
    partial: Path, task: Task, store: RowStore, writer: SplitWriter, fields: dict[str, list[str]], at_work: WorkFolder
) -> dict[str, Split]:
    ranges = [
        Range(task, at_work.store, fields, above, last, partial / f"part-{above}")
        for above, last in at_work.ranges(store.last_row())
    ]
    with Progress("Writing", store.count(*task.all_hashes)) as progress:
        for _ in at_work.workers.map(write_range, ranges, progress):
            pass
    return {
        split: writer.join(partial / f"{split}.jsonl", [rows.file.with_suffix(f".{split}") for rows in ranges])
        for split in task.split
    }


def write_range(rows: Range) -> None:
    """Write a file for each split, with the rows of it that are in the range."""
    store, writer = RowStore(rows.store, is_made=True), SplitWriter(rows.task, None)

    def batches(split: str) -> Iterator[list[StoredRow]]:
        for batch in store.batches(*rows.task.split[split], rows.above, rows.last):
            yield batch
            advance(len(batch))

    try:
        for split in rows.task.split:
            with rows.file.with_suffix(f".{split}").open("wb") as file:
                for lines in writer.lines(split, batches(split), rows.fields[split]):
                    file.write(lines)
    finally:
        store.close()
