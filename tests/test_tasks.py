"""Tasks are found by their folders: one from outside this repository works, and one that is deleted is not missed."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, needs_task
from fastapi.testclient import TestClient

from core.artifacts import Generation
from core.configuration import load_config, names, plain
from core.errors import UserError
from core.tasks import having, part_of
from evaluation.metrics import Evidence, measure
from serving.web.app import create_app
from serving.web.page import find_pages, task_config
from serving.web.settings import Settings

FILE = re.compile(r"^`([\w/]+\.\w+)`[^\n]*\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task of docs/tasks.md, file by file, and a table for it."""
    folder = tmp_path_factory.mktemp("outside")
    for name, content in FILE.findall((ROOT / "docs/tasks.md").read_text(encoding="utf-8")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    letters = random.Random(0)
    poems = [
        [" ".join("".join(letters.choices("aeioulmnrst", k=6)) for _ in range(4)) for _ in "12"] for _ in range(60)
    ]
    with (folder / "poems.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("Subject", "Poem"), *((one, f"{one} / {two}") for one, two in poems)])
    return folder


@pytest.fixture
def found(outside: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`outside` on Python's path, for this process and its children."""
    monkeypatch.syspath_prepend(outside)
    monkeypatch.setenv("PYTHONPATH", str(outside))
    return outside


@pytest.fixture
def data(found: Path, tmp_path: Path) -> Path:
    """What `make data TASK=poems` makes."""
    words = ["task=poems", f"task.data.source={found}/poems.csv", f"data_dir={tmp_path}/data", "trainer=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "commands.data", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "data"


def test_a_task_from_outside_is_known_beside_those_of_this_repository(found: Path) -> None:
    assert {"poems", "slang"} <= set(names("task"))
    assert {"poems", "slang"} <= set(having("rows")) & set(having("metrics")) & set(having("page"))
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^TASK: .*\bpoems\b", listed, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["TASK", "MODEL", "PEFT", "ENGINE", "RUNTIME", "ARGS", "GPUS", "TO", "PYTHON", "SOURCE"]
)
@pytest.mark.parametrize("form", ["$(shell touch {})", "$(touch {})", "`touch {}`", "slang $(touch {})"])
def test_no_value_is_expanded_by_make(tmp_path: Path, name: str, form: str) -> None:
    """In a folder with the Makefile, the names that exist, and a Python that prints its words."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "nemo_configs").symlink_to(ROOT / "nemo_configs")
    for file in ("Makefile", "train.lock"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\nprintf "[%s]" "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / ".venv/train.stamp").touch()
    value = form.format("expanded")
    done = subprocess.run(
        ["make", "data", f"{name}={value}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert not (tmp_path / "expanded").exists()
    if name in ("GPUS", "SOURCE"):
        assert f"={value}]" in done.stdout
    elif name not in ("ARGS", "TO"):
        assert done.returncode and f"{name}=" in done.stderr


def test_its_rows_are_worded_by_its_own_module(data: Path) -> None:
    row = json.loads((data / "training.jsonl").read_text().partition("\n")[0])
    assert row["input"] == f"Write a poem about {row['subject']}."
    assert row["output"] == row["poem"].replace(" / ", "\n") != row["poem"]


@pytest.mark.slow
def test_its_metric_is_measured_beside_the_usual_ones(data: Path, tiny_base: Path) -> None:
    config = plain(load_config(["task=poems"]))
    answers = [
        Generation(id=side, side=side, question="q", asked="q", seed=0, text=text, text_in="", ended=True)
        for side, text in (("before", "one"), ("after", "one\n\ntwo"))
    ]
    metrics, _ = measure(answers, Evidence(data, tiny_base, config), config["task"]["evaluate"]["metrics"])
    (verses,) = [metric for metric in metrics if metric.name == "verses"]
    assert verses.after[0] == 2 and verses.explanation == "How many verses the poem has, not counting empty lines."


@pytest.mark.usefixtures("found")
def test_its_page_is_part_of_the_site(tmp_path: Path) -> None:
    task_config.cache_clear()
    site = TestClient(create_app(Settings(runs=tmp_path, data=tmp_path, storage=tmp_path, hosts=("testserver",))))
    page = site.get("/poems")
    assert page.status_code == 200 and 'placeholder="a train that is never late"' in page.text
    assert '<a href="/poems" aria-current="page">Poems</a>' in page.text, "and the navigation leads there"
    assert "Answering" in site.get("/static/poems/page.js").text
    for private in ("page.py", "..%2frows.py", "page.html"):
        assert site.get(f"/static/poems/{private}").status_code == 404


@pytest.mark.usefixtures("found")
def test_its_name_is_offered_where_an_unknown_one_is_given() -> None:
    with pytest.raises(UserError, match=r"task.data.module=odes is unknown. Known: .*poems"):
        part_of("odes", "rows", "task.data.module")


def test_the_first_page_is_the_front_page(tmp_path: Path) -> None:
    site = TestClient(create_app(Settings(runs=tmp_path, data=tmp_path, storage=tmp_path, hosts=("testserver",))))
    first = find_pages()[0]
    front, own = site.get("/"), site.get(f"/{first.name}")
    assert front.text == own.text and f'<a href="/" aria-current="page">{first.page.title}</a>' in front.text


def test_a_page_cannot_take_a_path_of_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks/runs").mkdir(parents=True)
    (tmp_path / "tasks/runs/page.py").write_text(
        'from serving.web.page import Page\n\nPAGE = Page(task="slang", title="Mine")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"tasks/runs: the site answers /runs itself; give the folder another name"):
        find_pages()


# --- a task that is deleted -----------------------------------------------------------------------------------

DELETED = (
    "tasks/reviews",
    "nemo_configs/task/squid_game.yaml",
    "nemo_configs/experiment/squid_game_qlora.yaml",
)


@pytest.mark.slow
@needs_task("squid_game")
def test_the_rest_works_without_the_reviews(tmp_path: Path) -> None:
    """In a copy of the tree: all quick tests are collected; those of tasks and metrics pass."""
    tree = tmp_path / "tree"
    apart = (".git", ".*_cache", "__pycache__", "runs", "exports", "data", "build", "*.egg-info")
    left_out = shutil.ignore_patterns(*apart)
    tree.mkdir()
    for entry in ROOT.iterdir():
        if entry.name in left_out(ROOT, [entry.name]):
            continue
        if entry.name.startswith((".venv", "models")):
            (tree / entry.name).symlink_to(entry.resolve())
        elif entry.is_dir():
            shutil.copytree(entry, tree / entry.name, ignore=left_out)
        else:
            shutil.copy(entry, tree)
    for path in DELETED:
        shutil.rmtree(tree / path) if (tree / path).is_dir() else (tree / path).unlink()

    def run(*words: str, **environment: str) -> str:
        done = subprocess.run(
            words, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    pytest_here = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n0", "-m", "not slow")
    run(*pytest_here, "--collect-only")
    files = ("test_tasks.py", "test_metrics.py")
    run(*pytest_here, *(f"tests/{name}" for name in files))
    run(sys.executable, "-m", "commands.data", "task=slang", f"data_dir={tmp_path}/slang")
    (known,) = [line for line in run("make", "help").splitlines() if line.startswith("TASK:")]
    assert "squid_game" not in known.split() and "slang" in known.split()
