"""Tables that are no text file of this machine: Parquet, and data sets of the Hugging Face hub, of which a small one is
played here over HTTP for the real libraries."""

import hashlib
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from conftest import typed

from core.errors import UserError
from core.schema import Config
from data_prep.prepare import prepare
from data_prep.read_table import NotText, Row, open_table
from data_prep.sources import HubTable, find_source, open_source

LETTERS = random.Random(0)
ROWS = [
    tuple(" ".join("".join(LETTERS.choices("abdegiklmnoprstu", k=6)) for _ in range(n)) for n in (4, 7))
    for _ in range(60)
]
NAMES = {"question": ["question"], "answer": ["answer"]}


def csv_of(rows: list[tuple[str, ...]]) -> bytes:
    return ("question,answer\n" + "".join(f"{question},{answer}\n" for question, answer in rows)).encode()


def parquet_of(rows: list[tuple[str, ...]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    questions, answers = zip(*rows, strict=True)
    pyarrow.parquet.write_table(pyarrow.table({"question": questions, "answer": answers}), sink)
    return bytes(sink.getvalue())


def config_for(source: object, folder: Path) -> Config:
    split = {"validation": 0.2, "test": 0.2, "seed": 0}
    data = {
        "source": str(source),
        "columns": NAMES,
        "required": ["question", "answer"],
        "key": "question",
        "split": split,
        "max_chars": 4000,
    }
    prompt = {
        "template": "{instruction}\n{response}",
        "instruction": "{question}",
        "response": "{answer}",
        "fields": {},
    }
    return typed(task={"name": "bread", "data": data, "prompt": prompt}, data_dir=str(folder))


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


# --- Parquet --------------------------------------------------------------------------------------------------


def read(path: Path, names: dict[str, list[str]]) -> list[Row]:
    table = open_table(path, names, ())
    rows = list(table.rows)
    assert 0 < table.bytes_read() <= path.stat().st_size
    table.close()
    return rows


def test_parquet_is_read_as_the_same_csv_is(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(csv_of(ROWS))
    (tmp_path / "a.parquet").write_bytes(parquet_of(ROWS))
    one, other = (prepare(config_for(tmp_path / name, tmp_path / name[2:]), None) for name in ("a.csv", "a.parquet"))
    for split in ("training", "validation", "test"):
        assert (one / f"{split}.jsonl").read_bytes() == (other / f"{split}.jsonl").read_bytes()
    source = manifest_of(other)["source"]
    assert (source["form"], source["encoding"], source["bytes"]) == ("Parquet", None, len(parquet_of(ROWS)))
    assert source["sha256"] == hashlib.sha256(parquet_of(ROWS)).hexdigest()


def test_a_parquet_value_that_is_no_text_is_marked(tmp_path: Path) -> None:
    columns = {
        "text": ["one", None, "three"],
        "number": [1.5, float("nan"), 3.0],
        "flag": [None, True, None],
        "messages": [[{"role": "user", "content": "Hi"}], None, None],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", {name: [name] for name in (*columns, "missing")})
    assert [row.cells for row in rows] == [
        ["one", "1.5", "", '[{"role": "user", "content": "Hi"}]', ""],
        ["", "", "true", "", ""],
        ["three", "3.0", "", "", ""],
    ]
    marked = [[isinstance(cell, NotText) for cell in row.cells or []] for row in rows]
    assert marked == [[False, False, False, True, False], [False, False, True, False, False], [False] * 5]


def test_a_damaged_parquet_file_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_of(ROWS)[:-200])
    with pytest.raises(UserError, match="is a Parquet file that cannot be read"):
        open_table(tmp_path / "a.parquet", NAMES, ())


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_column_that_stands_twice_is_refused_where_it_is_needed(tmp_path: Path, name: str) -> None:
    if name == "a.csv":
        (tmp_path / name).write_text("Answer,question,answer,note,note\n1,2,3,4,5\n")
    else:
        headers = ["Answer", "question", "answer", "note", "note"]
        pyarrow.parquet.write_table(pyarrow.table([["1"], ["2"], ["3"], ["4"], ["5"]], names=headers), tmp_path / name)
    with pytest.raises(UserError, match="more than one column called 'Answer'; rename one of them"):
        open_table(tmp_path / name, NAMES, ())
    assert [row.cells for row in read(tmp_path / name, {"question": ["question"]})] == [["2"]]


# --- the hub --------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """What the hub answers about data sets, from memory.

    Attributes:
        repositories: files by path, by repository and commit; the last commit is the newest.
        locked: repositories whose files are only for those who accepted something.
        breaks_after: bytes after which the connection of the next longer file is cut, once.
        asked: the requests so far.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.locked: set[str] = set()
        self.breaks_after = 0
        self.asked: list[tuple[str, str, str | None]] = []

    def fetched(self, path: str) -> list[str | None]:
        """The ranges of the file that were asked for; None is the whole."""
        return [given for method, asked, given in self.asked if method == "GET" and asked.endswith(path)]


class HubAnswer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        length = int(self.headers.get("Content-Length") or 0)
        given = self.rfile.read(length).decode()
        kind, _, rest = urlparse(self.path).path.lstrip("/").removeprefix("api/").partition("/")
        owner, _, rest = rest.partition("/")
        name, _, rest = rest.partition("/")
        commits = self.server.repositories.get(f"{owner}/{name}") if kind == "datasets" else None
        if commits is None:
            return self.reply(404, b"{}", "RepoNotFound")
        what, _, rest = rest.partition("/")
        revision, _, path = rest.partition("/")
        commit = list(commits)[-1] if revision in ("", "main") else revision
        if commit not in commits:
            return self.reply(404, b"{}", "RevisionNotFound")
        files = commits[commit]
        if what == "resolve":
            if f"{owner}/{name}" in self.server.locked:
                return self.reply(403, b"", "GatedRepo")
            if path not in files:
                return self.reply(404, b"", "EntryNotFound", commit)
            return self.send_file(files[path], commit)
        listed: list[dict[str, Any]] = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        if what == "tree":
            inside = path + "/" * bool(path)
            below = [entry for entry in listed if entry["path"].startswith(inside)]
            deeper = [entry["path"] for entry in below if "/" in entry["path"][len(inside) :]]
            folders = {path[: path.index("/", len(inside))] for path in deeper}
            answer: Any = [entry for entry in below if entry["path"] not in deeper]
            answer += [{"type": "directory", "path": folder, "oid": ""} for folder in folders]
        elif what == "paths-info":
            answer = [entry for entry in listed if entry["path"] in parse_qs(given)["paths"]]
        else:
            siblings = [{"rfilename": path} for path in files]
            answer = {"id": f"{owner}/{name}", "sha": commit, "tags": [], "siblings": siblings, "gated": False}
        return self.reply(200, json.dumps(answer).encode())

    do_HEAD = do_POST = do_GET

    def send_file(self, content: bytes, commit: str) -> None:
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if first else 200)
        for header, value in {
            "Content-Length": len(content) - first,
            "Accept-Ranges": "bytes",
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            **({"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if first else {}),
        }.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.close_connection = 0 < self.server.breaks_after < len(content)
        self.wfile.write(content[first : self.server.breaks_after] if self.close_connection else content[first:])
        if self.close_connection:
            self.server.breaks_after = 0

    def reply(self, status: int, body: bytes, code: str = "", commit: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "X-Error-Code": code, "X-Repo-Commit": commit}
        for header, value in headers.items():
            if value:
                self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *words: object) -> None:
        pass


FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)  # what HF_ENDPOINT sets before they are imported
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    file_url = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", file_url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server.asked.clear()
    server.locked, server.breaks_after = {"baker/locked"}, 0
    table = {"README.md": b"# Bread\n", "train.csv": csv_of(ROWS), "test.csv": csv_of(ROWS[:5])}
    shards = {f"data/train-0000{n}-of-00002.parquet": parquet_of(ROWS[n * 30 : n * 30 + 30]) for n in range(2)}
    script = {"script.py": b"raise SystemExit('run')", "notes.md": b"nothing to read"}
    server.repositories = {
        "baker/bread": {FIRST: table},
        "baker/shards": {FIRST: shards},
        "baker/locked": {FIRST: table},
        "baker/script": {FIRST: script},
    }
    return server


def test_a_hub_table_becomes_what_its_file_would(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(csv_of(ROWS))
    here = prepare(config_for(tmp_path / "a.csv", tmp_path / "here"), None)
    there = prepare(config_for("hf:baker/bread", tmp_path / "there"), None)
    for split in ("training", "validation", "test"):
        assert (here / f"{split}.jsonl").read_bytes() == (there / f"{split}.jsonl").read_bytes()
    assert manifest_of(there)["source"] == {
        "name": "hf:baker/bread:train",
        "repository": "baker/bread",
        "config": None,
        "revision": FIRST,
        "split": "train",
        "files": ["train.csv"],
        "sha256": hashlib.sha256(csv_of(ROWS)).hexdigest(),
        "bytes": len(csv_of(ROWS)),
        "form": "CSV",
        "encoding": "utf-8",
        "columns": {"question": "question", "answer": "answer"},
        "unused": [],
        "notes": [],
    }


def test_a_split_of_several_files_is_one_table(hub: Hub) -> None:
    table = open_source(find_source("hf:baker/shards"), NAMES, ["question"])
    rows = list(table.rows)
    table.close()
    assert [row.cells for row in rows] == [list(row) for row in ROWS]
    assert [row.number for row in rows] == list(range(1, 61))


def test_a_hub_table_is_made_again_when_there_is_a_new_commit(hub: Hub, tmp_path: Path) -> None:
    config = config_for("hf:baker/bread", tmp_path / "data")
    prepare(config, None)
    hub.asked.clear()
    prepare(config, None)
    assert not [asked for asked in hub.asked if "/resolve/" in asked[1]], "nothing is fetched for what is up to date"
    assert manifest_of(tmp_path / "data")["rows_in"] == 60
    hub.repositories["baker/bread"][SECOND] = {"train.csv": csv_of(ROWS[:50])}
    prepare(config, None)
    assert manifest_of(tmp_path / "data")["rows_in"] == 50
    assert manifest_of(tmp_path / "data")["source"]["revision"] == SECOND
    prepare(config_for(f"hf:baker/bread@{FIRST}", tmp_path / "data"), None)
    assert manifest_of(tmp_path / "data")["rows_in"] == 60


def test_a_named_commit_that_is_prepared_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    config = config_for(f"hf:baker/bread@{FIRST}:train", tmp_path / "data")
    prepare(config, None)
    hub.asked.clear()
    prepare(config, None)
    assert not hub.asked


def test_a_pinned_table_names_its_commit(hub: Hub) -> None:
    source = find_source("hf:baker/bread:test")
    assert isinstance(source, HubTable) and str(source.pinned()) == f"hf:baker/bread@{FIRST}:test"


def test_a_download_that_breaks_goes_on_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # kept, of what arrives
    hub.breaks_after = 1000
    (file,) = find_source("hf:baker/bread").files
    assert file.read_bytes() == csv_of(ROWS)
    assert hub.fetched("train.csv") == [None, "bytes=1000-"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:baker/locked", "baker/locked is gated, and no token is set: export HF_TOKEN=hf_...*Accept its terms at"),
        ("hf:baker/nothing", "https://huggingface.co/datasets/baker/nothing does not exist, or is private"),
        ("hf:baker/bread@no-such", "baker/bread has no revision 'no-such'"),
        (
            "hf:baker/bread:dev",
            "has no split 'dev'. Name one of these as SOURCE: hf:baker/bread:t",
        ),
        ("hf:baker/bread/french", "cannot be read as a table: BuilderConfig 'french' not found"),
        ("hf:baker/script", "cannot be read as a table"),
        ("hf:bread", "hf:bread does not name a dataset on the Hugging Face hub. Write hf:OWNER/NAME"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(hub: Hub, tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(config_for(source, tmp_path / "data"), None)
    for part in message.split("*"):
        assert part in str(error.value)
    assert not (tmp_path / "data").exists()


def test_a_hub_that_cannot_be_asked_is_said_in_words(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message() -> str:
        with pytest.raises(UserError) as error:
            prepare(config_for("hf:baker/bread", tmp_path / "data"), None)
        return str(error.value)

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached (ConnectError)" in message()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it to download" in message()


@pytest.mark.parametrize(
    "text", ["hf:baker/bread:train", "hf:baker/bread/french:dev", f"hf:baker/bread@{FIRST}:train", "hf:b/c/d@v1.0:e"]
)
def test_a_hub_table_s_name_names_it_again(text: str) -> None:
    source = find_source(text)
    assert isinstance(source, HubTable) and str(source) == text


def test_the_parts_of_a_name() -> None:
    assert find_source("hf:a/b") == HubTable("a/b", "", "", "train")
    assert find_source("hf:a/b/c@d:e") == HubTable("a/b", "c", "d", "e")
