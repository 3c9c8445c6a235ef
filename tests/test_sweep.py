"""Runs beside each other: which there are, that none is made again, and that the page says what they came to."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from launcher import ENVIRONMENT

from benchmarks import figures, trained
from benchmarks.sweep import AROUND, Options, combinations
from core.arguments import parse
from core.artifacts import Generation
from core.configuration import load_config
from core.errors import UserError

DEFAULT = load_config(["task=slang", "trainer=cpu"])


def test_without_values_one_factor_at_a_time_is_varied_around_the_default() -> None:
    runs = [load_config(["trainer=cpu", *words]) for _, words in combinations(DEFAULT, Options())]
    settings = [(one.peft.r, one.task.train.learning_rate, one.task.train.epochs) for one in runs]
    assert runs[0] == DEFAULT
    assert all(sum(a != b for a, b in zip(one, settings[0], strict=True)) == 1 for one in settings[1:])
    assert [sorted(set(values)) for values in zip(*settings, strict=True)] == list(AROUND.values())
    assert len({name for name, _ in combinations(DEFAULT, Options())}) == len(settings) == 7


def test_values_that_are_given_are_combined() -> None:
    options = parse(Options, ["rank=4,32", "epochs=1,2,5"])
    runs = [load_config(["trainer=cpu", *words]) for _, words in combinations(DEFAULT, options)]
    assert {(one.peft.r, one.task.train.epochs) for one in runs} == {(r, e) for r in (4, 32) for e in (1, 2, 5)}
    assert {one.task.train.learning_rate for one in runs} == {DEFAULT.task.train.learning_rate}
    assert {one.peft.lora_alpha / one.peft.r for one in runs} == {DEFAULT.peft.lora_alpha / DEFAULT.peft.r}


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("rank=8,0", "rank must be 1 or more"),
        ("rank=2.5", "rank must be a whole number"),
        ("rate=0", "rate must be above 0"),
        ("rate=inf", "rate must be a number"),
        ("epochs=3,3", "has a value twice"),
        ("epochs=", "epochs must not be empty"),
    ],
)
def test_a_bad_grid_is_refused(word: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse(Options, [word])


@pytest.mark.slow
def test_a_run_is_made_once_and_the_page_says_what_it_came_to(
    tiny_base: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (ENVIRONMENT | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/attempts.md"
    page.write_text("<!--figure sweep--><!--/figure-->\n")
    words = ["trainer=cpu", f"model.path={tiny_base}", f"task.data.source={source}", "task.train.epochs=1"]
    words += ["task.generate.max_new_tokens=4", "task.evaluate.seeds=1", "task.evaluate.held_out=2"]
    words += ["task.evaluate.questions=[{}]"]
    one = trained.trained([*words, "peft.r=1"], tmp_path / "one")

    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))  # what is started now fails
    assert trained.trained([*words, "peft.r=1"], tmp_path / "one") == one
    with pytest.raises(OSError, match="no-python"):
        trained.trained([*words, "peft.r=2"], tmp_path / "two", one)
    (begun,) = (tmp_path / "two").glob("runs/slang/*")
    lines = Generation.read_lines(one.folder / "generations.jsonl")
    asked = [it for it in lines if it.side == "before"]
    assert len(asked) == 3 and Generation.read_lines(begun / "generations.jsonl") == asked
    assert (begun / "before.json").read_bytes() == (one.folder / "before.json").read_bytes()

    (tmp_path / "sweep.json").write_text(json.dumps({"command": "this test"} | trained.summary({"r1": one})))
    figures.refresh()
    table = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("|")]
    base, first = (dict(zip(table[0], cells, strict=True)) for cells in table[2:])
    assert base["held-out loss"] == f"{one.evaluation.before.loss:.3f}"
    assert first["held-out loss"] == f"{one.evaluation.after.loss:.3f}" and first["rank"] == "1"
    assert first["New term"].endswith(", 3 questions") and first["Well-formed"].endswith(", 3 questions")
    said = [sample["answers"]["r1"] for sample in trained.summary({"r1": one})["samples"]]
    assert said == [it.text for it in lines if it.side == "after"]
