"""A table of rows becomes training data: read, clean, merge, split, part the near-duplicates, write, say what was done.

    python -m data_prep task=slang task.data.source=mine.csv

The result is a folder with `training.jsonl`, `validation.jsonl` and `test.jsonl` (one `{"input", "output", "row",
<columns>}` a line, not yet wrapped in the prompt's template), `dropped.jsonl` (every row left out, with its reason)
and `manifest.json` (what went in, what came out, hashes of both). It appears whole or not at all, and is left as it
is while source, task, seed and tokenizer stay the same.
"""

import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.clean_text import clean, is_explicit, key_of
from data_prep.data_folder import MANIFEST, building, read_manifest
from data_prep.progress import Progress
from data_prep.prompt import Prompt
from data_prep.read_table import Table, open_table
from data_prep.row_store import BATCH, Drop, Entry, RowStore
from data_prep.split import hash_of, ranges
from data_prep.write_splits import SplitWriter
from nemo_configs.command_line import UserError

FORMAT = 1  # raise it when the same source would come out otherwise: folders made before are then made anew
DATABASE = "rows.sqlite"
NEAR = "near-duplicate of a held-out row"


@dataclass(frozen=True)
class Task:
    """What `prepare` asks of a task's YAML, checked."""

    name: str
    source: Path
    columns: dict[str, list[str]]
    required: list[str]
    key: str
    split: dict[str, tuple[int, int]]
    max_chars: int
    drop_explicit: bool
    train_fields: list[str]
    train_rows: int | None
    prompt: Prompt
    seed: int

    @classmethod
    def of(cls, config: DictConfig) -> "Task":
        """Raises UserError: a field that is no column, shares that leave no training rows, a prompt without response."""
        data: dict[str, Any] = OmegaConf.to_container(config.task.data)  # type: ignore[assignment]
        columns, share = data["columns"], data["split"]
        train_fields = data["train_fields"] or list(columns)
        for option, fields in {
            "required": data["required"],
            "key": [data["key"]],
            "train_fields": train_fields,
        }.items():
            if unknown := [field for field in fields if field not in columns]:
                raise UserError(f"task.data.{option} names {', '.join(unknown)}; the columns are {', '.join(columns)}")
        required = list(dict.fromkeys([data["key"], *data["required"]]))
        if lacking := [field for field in required if field not in train_fields]:
            raise UserError(f"task.data.train_fields leaves out {', '.join(lacking)}, which every row needs")
        if not (0 < share["validation"] and 0 < share["test"] and share["validation"] + share["test"] < 1):
            raise UserError(f"task.data.split: validation and test must be above 0 and below 1 together, not {share}")
        if data["train_rows"] is not None and data["train_rows"] < 1:
            raise UserError(f"task.data.train_rows must be 1 or more, not {data['train_rows']}")
        try:
            prompt = Prompt(**OmegaConf.to_container(config.task.prompt))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"task.prompt: {error}") from None
        return cls(
            name=config.task.name,
            source=Path(data["source"]).expanduser(),
            columns=columns,
            required=required,
            key=data["key"],
            split=ranges(share["validation"], share["test"]),
            max_chars=data["max_chars"],
            drop_explicit=data["drop_explicit"],
            train_fields=train_fields,
            train_rows=data["train_rows"],
            prompt=prompt,
            seed=config.seed,
        )


def prepare(config: DictConfig, tokenizer_file: Path | None) -> Path:
    """Make the data folder `config.data_dir` of `config.task`, or find it up to date.

    Args:
        config: the resolved tree; `task`, `seed` and `data_dir` are used.
        tokenizer_file: a `tokenizer.json` to count tokens with; None leaves the counts out.

    Returns:
        The folder.

    Raises:
        UserError: a source that is no table or has too few rows, a task that does not fit it, no room to write.
            A data folder made before is then as it was.
    """
    task = Task.of(config)
    folder = Path(config.data_dir)
    if task.source.absolute().is_relative_to(folder.absolute()):
        raise UserError(f"the source {task.source} lies in {folder}, which is replaced; move it elsewhere")
    try:
        hashes = {
            "source": _hash(task.source) if task.source.is_file() else None,
            "tokenizer": _hash(tokenizer_file) if tokenizer_file else None,
        }
        options = OmegaConf.to_container(config.task.data) | {"source": task.source.name}  # type: ignore[operator]
        made_of = [FORMAT, hashes, options, OmegaConf.to_container(config.task.prompt), task.seed]
        fingerprint = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        with building(folder, fingerprint) as partial:
            if partial is None:
                splits = read_manifest(folder)["splits"]
                print(f"{folder} is up to date: {' / '.join(str(split['rows']) for split in splits.values())} rows")
                return folder
            manifest = {"task": task.name, "fingerprint": fingerprint}
            manifest |= _fill(partial, task, hashes["source"], tokenizer_file)
            manifest |= {"seed": task.seed, "tokenizer_sha256": hashes["tokenizer"]}
            text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
            (partial / MANIFEST).write_text(text, encoding="utf-8")
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"cannot prepare {folder}: {error}") from None
    _report(folder, task, manifest)
    return folder


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill(partial: Path, task: Task, source_hash: str | None, tokenizer_file: Path | None) -> dict[str, Any]:
    """Write all files but the manifest into `partial`; the manifest's middle part."""
    table = open_table(task.source, task.columns, task.required)
    store = RowStore(partial / DATABASE)
    try:
        read, repaired = _read(table, task, store)
        store.index()
        merged = _merge_repeated(task, store)
        _part_near_duplicates(task, store)
        if task.train_rows is not None:
            for batch in store.beyond(*task.split["training"], task.train_rows):
                store.drop([Drop(entry.row, f"beyond train_rows: {task.train_rows}", entry.key) for entry in batch])
        _check_sizes(task, store)
        splits = _write(partial, task, store, tokenizer_file)
        dropped = store.drop_counts()
    finally:
        table.close()
        store.close()
    (partial / DATABASE).unlink()
    return {
        "source": {
            "name": task.source.name,
            "sha256": source_hash,
            "bytes": task.source.stat().st_size,
            "encoding": table.encoding,
            "columns": table.columns,
        },
        "rows_in": read,
        "rows_out": sum(split["rows"] for split in splits.values()),
        "dropped": dropped,
        "merged": merged,
        "repaired": repaired,
        "splits": splits,
    }


# --- read and clean -------------------------------------------------------------------------------------------


def _read(table: Table, task: Task, store: RowStore) -> tuple[int, int]:
    """Every row into `store`, cleaned, or dropped. Returns the rows read and the cells repaired."""
    fields = list(task.columns)
    key_place, required = fields.index(task.key), [fields.index(field) for field in task.required]
    number = repaired = 0
    entries: list[tuple[int, Entry]] = []
    drops: list[Drop] = []
    with Progress(f"Reading {task.source.name}", task.source.stat().st_size) as progress:
        for number, line, raw, problem in table.rows:
            if raw is None:
                drops.append(Drop(number, problem, line=line))
            else:
                cleaned = [clean(cell) for cell in raw]
                cells = [text for text, _ in cleaned]
                repaired += sum(changed for _, changed in cleaned)
                key = key_of(cells[key_place])
                if reason := _unusable(task, cells, fields, required):
                    drops.append(Drop(number, reason, key[:100]))
                else:
                    entries.append((hash_of(key, task.seed), Entry(number, key, cells)))
            if number % BATCH == 0:
                store.add(entries)
                store.drop(drops)
                entries, drops = [], []
                progress.at(table.bytes_read)
        store.add(entries)
        store.drop(drops)
    return number, repaired


def _unusable(task: Task, cells: list[str], fields: list[str], required: list[int]) -> str:
    for place in required:
        if not cells[place]:
            return f"no {fields[place]}"
    if sum(map(len, cells)) > task.max_chars:
        return f"longer than {task.max_chars} characters"
    if task.drop_explicit and is_explicit(" ".join(cells)):
        return "explicit term"
    return ""


# --- rows that say the same -----------------------------------------------------------------------------------


def _merge_repeated(task: Task, store: RowStore) -> int:
    """One row per key: the first, with its gaps filled from those that say the same; how many went into others.

    A row which gives the key another meaning is dropped, as its example and context are about that one.
    """
    from data_prep.near_duplicates import SAME_TEXT, Wording
    from rapidfuzz import fuzz

    fields = list(task.columns)
    rest = [fields.index(field) for field in task.required if field != task.key]
    other = f"repeated {task.key}, another {' or '.join(fields[place] for place in rest)}"
    merged = 0
    for first, *later in store.repeated():
        meaning, cells = Wording.of(first.cells, first.key, rest).rest, list(first.cells)
        same, drops = [], []
        for entry in later:
            if fuzz.ratio(meaning, Wording.of(entry.cells, entry.key, rest).rest) < SAME_TEXT:
                drops.append(Drop(entry.row, other, entry.key, of=first.row))
            else:
                same.append(entry.row)
                cells = [mine or theirs for mine, theirs in zip(cells, entry.cells, strict=True)]
        store.drop(drops)
        store.remove(same)
        merged += len(same)
        if cells != first.cells:
            store.update(first._replace(cells=cells))
    return merged


def _part_near_duplicates(task: Task, store: RowStore) -> None:
    """Held-out wins: training rows near a held-out one, and validation rows near a test one, are dropped."""
    from data_prep.near_duplicates import Candidates, Wording, are_near

    fields = list(task.columns)
    rest = [fields.index(field) for field in task.required if field != task.key]

    def wordings(entries: list[Entry]) -> list[Wording]:
        return [Wording.of(entry.cells, entry.key, rest) for entry in entries]

    def texts(entries: list[Entry]) -> tuple[list[str], list[int]]:
        pairs = [
            (text, entry.row) for entry, said in zip(entries, wordings(entries), strict=True) for text in said.texts()
        ]
        return [text for text, _ in pairs], [row for _, row in pairs]

    held_out = Candidates()
    done, total = 0, store.count(0, task.split["training"][1])
    with Progress("Comparing with held-out rows", total) as progress:
        for held, asking in (("test", "validation"), ("validation", "training")):
            for batch in store.batches(*task.split[held]):
                held_out.add(*texts(batch))
            for batch in store.batches(*task.split[asking]):
                pairs = held_out.of(*texts(batch))
                mine = {entry.row: entry for entry in batch}
                theirs = store.get(sorted(set(pairs[:, 1].tolist())))
                one = wordings([mine[row] for row in pairs[:, 0].tolist()])
                other = wordings([theirs[row] for row in pairs[:, 1].tolist()])
                near = dict(reversed(pairs[are_near(one, other)].tolist()))
                store.drop([Drop(row, NEAR, mine[row].key, of=of) for row, of in near.items()])
                done += len(batch)
                progress.at(done)


# --- write ----------------------------------------------------------------------------------------------------


def _check_sizes(task: Task, store: RowStore) -> None:
    """Raises UserError where a split is empty, with what would fill it."""
    rows = {split: store.count(*ends) for split, ends in task.split.items()}
    usable, empty = sum(rows.values()), [split for split, count in rows.items() if count == 0]
    if not empty:
        return
    why = "".join(f"\n  {count} dropped: {reason}" for reason, count in store.drop_counts().items())
    if not usable:
        raise UserError(f"{task.source} has no usable row{':' if why else ''}{why}")
    shares = [end - first for first, end in task.split.values()]
    needed = math.ceil(math.log(100) * sum(shares) / min(shares))  # leaves the smallest split empty once in 100 times
    seed = _seed_that_fills(task, store) if usable <= 1000 else None
    raise UserError(
        f"too few rows: {usable} of {task.source} can be used, and the {' and '.join(empty)} split got none.{why}\n"
        f"Rows are dealt by a hash of {task.key}, so that none moves when others are added: about {needed} rows fill "
        f"all splits.\nAdd rows, raise the shares in task.data.split"
        + (f", or deal these rows another way: seed={seed}" if seed is not None else "")
    )


def _seed_that_fills(task: Task, store: RowStore) -> int | None:
    keys = [entry.key for batch in store.batches(0, max(end for _, end in task.split.values())) for entry in batch]
    for seed in range(1000):
        hashes = [hash_of(key, seed) for key in keys]
        if all(any(first <= hashed < end for hashed in hashes) for first, end in task.split.values()):
            return seed
    return None


def _write(partial: Path, task: Task, store: RowStore, tokenizer_file: Path | None) -> dict[str, dict[str, Any]]:
    """The split files and `dropped.jsonl`; the manifest's part on each split."""
    writer = SplitWriter(task.name, task.columns, task.prompt, tokenizer_file)
    splits: dict[str, dict[str, Any]] = {}
    done = 0
    with Progress("Writing", store.count(0, max(end for _, end in task.split.values()))) as progress:

        def batches(split: str) -> Iterator[list[Entry]]:
            nonlocal done
            for batch in store.batches(*task.split[split]):
                yield batch
                done += len(batch)
                progress.at(done)

        for split in task.split:
            fields = task.train_fields if split == "training" else list(task.columns)
            splits[split] = writer.write(partial / f"{split}.jsonl", batches(split), fields)
    with (partial / "dropped.jsonl").open("w", encoding="utf-8") as file:
        for drop in store.drops():
            known = {name: value for name, value in drop._asdict().items() if value is not None}
            file.write(json.dumps(known, ensure_ascii=False) + "\n")
    return splits


def _report(folder: Path, task: Task, manifest: dict[str, Any]) -> None:
    """What a user should see before training: the counts, and two rows as the model will read them."""
    splits, dropped = manifest["splits"], manifest["dropped"]
    sizes = ", ".join(f"{split['rows']:,} {name}" for name, split in splits.items())
    print(f"{folder}: {manifest['rows_in']:,} rows in, {manifest['rows_out']:,} out: {sizes}")
    if manifest["merged"]:
        print(f"  {manifest['merged']:,} merged into an earlier row of the same {task.key}")
    if manifest["repaired"]:
        print(f"  {manifest['repaired']:,} cells repaired (encoding, quotes, control characters)")
    if dropped:
        print(f"  {sum(dropped.values()):,} dropped, listed in {folder / 'dropped.jsonl'}:")
        for reason, count in dropped.items():
            print(f"  {count:>8,}  {reason}")
    if tokens := splits["training"].get("tokens"):
        print(f"  tokens of a training row: {tokens['mean']} on average, {tokens['max']} at most")
    with (folder / "training.jsonl").open(encoding="utf-8") as file:
        for number, line in enumerate(islice(file, 2), 1):
            row = json.loads(line)
            text = task.prompt.wrap(row["input"]) + row["output"]
            print(f"\nExample {number} of {splits['training']['rows']:,} (source row {row['row']})")
            print("\n".join(f"  | {part}" for part in text.split("\n")))
