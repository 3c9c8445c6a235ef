"""Sources that are folders or patterns of files, and large ones: read by all cores, with bounded memory, resumably."""

import bz2
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from benchmarks import prepare as benchmark
from benchmarks.prepare import made_rows
from core.configuration import load_config
from core.errors import UserError
from data_prep import candidates, prepare, read_rows, same_rows, work_folder
from data_prep.candidates import Candidates, Signatures
from data_prep.find_files import files_of
from data_prep.minhash import _MULTIPLIERS, _library, _smallest_in_c, smallest
from data_prep.near_duplicates import Wording
from data_prep.row_store import RowStore
from data_prep.sources import LocalFiles, find_source, open_source
from data_prep.workers import Workers

ROWS = list(made_rows(400, seed=3))
NAMES = {"question": ["question"], "answer": ["answer"]}
WRITTEN = ("training.jsonl", "validation.jsonl", "test.jsonl", "dropped.jsonl")


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_shards(folder: Path, rows: list[dict[str, str]] = ROWS, shards: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // shards)
    for number in range(shards):
        (folder / f"part-{number:05}.jsonl").write_bytes(lines(rows[number * size : (number + 1) * size]))
    return folder


def prepared(source: Path | str, folder: Path) -> dict[str, bytes]:
    words = [
        "task=slang",
        f"task.data.source={source}",
        f"data_dir={folder}",
        "trainer=cpu",
        "task.data.module=null",
        "task.data.columns.slang=[question]",
        "task.data.columns.description=[answer]",
    ]
    prepare.prepare(load_config(words), None, 0)
    return {name: (folder / name).read_bytes() for name in WRITTEN}


def read(text: Path | str) -> list[list[str] | None]:
    table = open_source(find_source(str(text)), NAMES, list(NAMES))
    try:
        return [row.cells for row in table.rows]
    finally:
        table.close()


# --- what is a source ------------------------------------------------------------------------------------------------


def test_a_folder_is_read_as_spark_leaves_it(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "rows", ROWS[:20], 2)
    (folder / "_SUCCESS").touch()
    (folder / "._SUCCESS.crc").write_bytes(b"crc")
    (folder / ".part-00000.jsonl.crc").write_bytes(b"crc")
    (folder / "_temporary").mkdir()
    (folder / "_temporary/part-00009.jsonl").write_bytes(lines(ROWS[20:]))
    (folder / "part-00007.jsonl").write_text("\n")  # a partition without rows, of NeMo Curator
    (folder / "day=2").mkdir()
    (folder / "day=2/part-00000.jsonl").write_bytes(lines(ROWS[20:22]))
    source = LocalFiles(str(folder))
    assert read(folder) == [list(row.values()) for row in [*ROWS[20:22], *ROWS[:20]]]
    assert source.record()["files"] == ["day=2/part-00000.jsonl", "part-00000.jsonl", "part-00001.jsonl"]
    assert source.name == "rows"
    assert source.notes == ["1 empty file left out"]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_pattern_of_packed_shards_is_read(tmp_path: Path, suffix: str) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
    }
    for number in range(3):
        (tmp_path / f"part-{number}.jsonl.{suffix}").write_bytes(pack[suffix](lines(ROWS[4 * number : 4 * number + 4])))
    (tmp_path / "other.csv").write_text("question,answer\nno,no\n")
    assert read(tmp_path / f"part-*.jsonl.{suffix}") == [list(row.values()) for row in ROWS[:12]]


def test_parquet_and_what_datasets_saves_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    (tmp_path / "parquet").mkdir()
    for number in range(2):
        table = pyarrow.Table.from_pylist(ROWS[5 * number : 5 * number + 5])
        pyarrow.parquet.write_table(table, tmp_path / f"parquet/part-{number:05}-c000.snappy.parquet")
    wanted = [list(row.values()) for row in ROWS[:10]]
    assert read(tmp_path / "parquet") == wanted
    saved = Dataset.from_list(ROWS[:10])
    DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved/train") == wanted
    with pytest.raises(UserError, match=r"holds the splits test, train; name one of them: SOURCE=.*saved/test"):
        read(tmp_path / "saved")


def test_what_is_no_source_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches .*\*\.csv"):
        files_of(f"{tmp_path}/*.csv")
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match="all 1 files are empty"):
        files_of(str(tmp_path))
    (tmp_path / "a.csv").write_text("question,answer\n")
    (tmp_path / "README.md").write_text("about it")
    assert files_of(str(tmp_path)) == ([tmp_path / "a.csv"], 0)
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"several kinds \(1 CSV, 1 JSON Lines\)"):
        files_of(str(tmp_path))


def test_a_shard_without_a_column_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path / "rows", ROWS[:20], 2)
    (tmp_path / "rows/part-00002.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(UserError, match=r"part-00002.jsonl has no column for answer"):
        read(tmp_path / "rows")


# --- large ones ------------------------------------------------------------------------------------------------------


@pytest.fixture
def by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source is large; the work is done in this process."""
    monkeypatch.setattr(prepare, "LARGE", 0)
    monkeypatch.setattr(work_folder, "Workers", partial(Workers, 1))
    monkeypatch.setattr(work_folder, "ROWS_AT_ONCE", 90)


def test_shards_in_parts_give_the_bytes_of_one_file(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    whole = prepared(tmp_path / "rows.jsonl", tmp_path / "whole")
    request.getfixturevalue("by_parts")
    assert prepared(write_shards(tmp_path / "rows"), tmp_path / "parts") == whole
    assert prepared(tmp_path / "rows.jsonl", tmp_path / "one") == whole
    assert {path.name for path in tmp_path.iterdir() if path.name.endswith(".work")} == set(), "no work is left"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["rows", "rows.jsonl"])
def test_processes_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    write_shards(tmp_path / "rows")
    whole = prepared(tmp_path / "rows.jsonl", tmp_path / "whole")
    monkeypatch.setattr(prepare, "LARGE", 0)
    monkeypatch.setattr(work_folder, "Workers", partial(Workers, 3))
    assert prepared(tmp_path / source, tmp_path / "parts") == whole


KILLED = """
import os, signal, sys
from functools import partial
from data_prep import prepare, row_store, work_folder, write_splits
from data_prep.workers import Workers

def dies(function, calls):
    def called(*given, **more):
        nonlocal calls
        calls -= 1
        if not calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **more)
    return called

if __name__ == "__main__":
    prepare.LARGE = 0
    work_folder.Workers = partial(Workers, int(sys.argv[1]))
    where = sys.argv[2]
    if where == "reading":
        row_store.RowStore.take_in = dies(row_store.RowStore.take_in, 3)
    if where == "grouping":
        prepare.WorkFolder.keep = dies(prepare.WorkFolder.keep, 1)
    if where == "writing":
        write_splits.SplitWriter.join = dies(write_splits.SplitWriter.join, 2)
    from commands.data import main
    main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("where", "says"),
    [("reading", "of {parts} parts of"), ("grouping", "{parts} of {parts} parts of"), ("writing", "gathered before")],
)
def test_after_a_kill_the_same_command_goes_on_to_the_same_bytes(
    tmp_path: Path, where: str, says: str, workers: int
) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    source = write_shards(tmp_path / "rows")
    words = ["task=slang", f"task.data.source={source}", "trainer=cpu", "task.data.module=null", "examples=0"]
    words += ["task.data.columns.slang=[question]", "task.data.columns.description=[answer]"]

    def command(where: str, folder: str) -> "subprocess.CompletedProcess[str]":
        called = [sys.executable, str(tmp_path / "killed.py"), str(workers), where, *words]
        return subprocess.run(
            [*called, f"data_dir={tmp_path / folder}"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    assert command("nowhere", "whole").returncode == 0
    assert command(where, "killed").returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    again = command("nowhere", "killed")
    assert again.returncode == 0, again.stderr
    assert says.format(parts=5 * workers) in again.stdout
    for name in (*WRITTEN, "manifest.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".killed.work").exists()


@pytest.mark.parametrize("cores", [1, 3])
def test_other_cores_go_on_with_the_parts_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_parts: None, cores: int
) -> None:
    source = write_shards(tmp_path / "rows", shards=2)
    whole = prepared(source, tmp_path / "whole")
    monkeypatch.setattr(read_rows, "BATCH", 50)  # rows of a block, so that both parts of a file have some

    def on(count: int) -> Workers:
        workers = Workers(1)  # this process does the work of all
        workers.count = count
        return workers

    taken = list[Path]()

    def ends_at_the_second(store: RowStore, path: Path, above: int) -> None:
        taken.append(path)
        if len(taken) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(work_folder, "Workers", lambda: on(2))
        killed.setattr(RowStore, "take_in", ends_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            prepared(source, tmp_path / "parts")
    monkeypatch.setattr(work_folder, "Workers", lambda: on(cores))
    assert prepared(source, tmp_path / "parts") == whole


def test_a_user_error_leaves_no_work(tmp_path: Path, by_parts: None) -> None:
    source = write_shards(tmp_path / "rows", ROWS[:20], 2)
    (source / "part-00001.jsonl").write_text("{}\n{broken\n")
    with pytest.raises(UserError, match=r"part-00001.jsonl"):
        prepared(source, tmp_path / "data")
    assert not (tmp_path / ".data.work").exists()


# --- near-duplicates -------------------------------------------------------------------------------------------------


def near_pairs(folder: Path) -> set[tuple[int, int]]:
    said = {
        number: Wording.of([row["question"], row["answer"]], row["question"], [1]) for number, row in enumerate(ROWS, 1)
    }
    index = Candidates(folder)
    for first in range(1, len(said) + 1, 50):
        index.add(Signatures.of({number: said[number] for number in range(first, min(first + 50, len(said) + 1))}))
    found = {pair for ones, others in index.pairs() for pair in zip(ones.tolist(), others.tolist(), strict=True)}
    index.close()
    assert not list(folder.iterdir()), "its files are gone"
    return found


def test_candidates_do_not_depend_on_how_many_fit_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = near_pairs(tmp_path)
    assert len(found) > 5
    for name, size in {"IN_MEMORY": 100, "IN_HAND": 20, "CHUNK": 37}.items():
        monkeypatch.setattr(candidates, name, size)
    assert near_pairs(tmp_path) == found


def test_minhash_in_c_is_that_of_numpy() -> None:
    if not (library := _library()):
        pytest.skip("no C compiler")
    chance = random.Random(5)
    texts = ["", "a", "abc", "žluťoučký kůň 🐎" * 40, *("x" * size for size in range(1, 12))]
    texts += ["".join(chance.choices("abcdefgh ", k=chance.randint(1, 900))) for _ in range(40)]
    blank = "\0" * 3
    letters = np.frombuffer((blank + blank.join(texts) + blank).encode("utf-32-le"), np.uint32)
    starts = np.cumsum([0] + [len(text) + 3 for text in texts], dtype=np.int64)
    assert (_smallest_in_c(library, letters, starts) == smallest(letters, starts)).all()
    assert len(_MULTIPLIERS) == 100


def test_a_key_of_very_many_rows_is_merged_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "W", "answer": f"meaning {number} of a letter"} for number in range(30)]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines([*rows, rows[0], *ROWS[:200]]))
    whole = prepared(source, tmp_path / "whole")
    monkeypatch.setattr(same_rows, "FAMILY", 5)
    monkeypatch.setattr("data_prep.row_store.BATCH", 4)
    assert prepared(source, tmp_path / "portions") == whole, "a repeat of the first row is still known"


@pytest.mark.slow
def test_the_benchmark_measures_this_version_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    benchmark.main(["rows=2000", "against="])
    found = json.loads((tmp_path / "prepare.json").read_text())
    assert [(run["version"], run["rows"]) for run in found["runs"]] == [("ours", 1000), ("ours", 2000)]
    assert all(0 < run["rows_out"] < run["rows"] and run["peak_mib"] > 0 for run in found["runs"])
