"""The report of a run: what it shows is what was measured, and it needs nothing but itself."""

import html
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import report as report_command
from core.configuration import load_config
from core.errors import UserError
from core.run_folder import newest_run
from evaluation import report

EVIL = "<script>alert('boo')</script> 🔥 \"quoted\" & $x^2$"


def write_run(folder: Path, steps: int = 60) -> Path:
    """What training leaves of `steps` steps in three epochs."""
    folder.mkdir(parents=True)
    config = {
        "task": {
            "name": "slang",
            "train": {"epochs": 3},
            "generate": {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 120},
        },
        "model": {"name": "gemma-3-270m", "repo": "google/gemma-3-270m", "revision": None},
        "peft": {"name": "lora", "r": 8},
        "seed": 7,
        "experiment_name": "",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "epoch": 0,
                "train_loss": 3 / step,
                "learning_rate": 1e-4 / step,
                "grad_norm": 1.0,
                "tokens_per_second": 500.0 + step,
                "seconds": 2.0,
            }
        )
        if step % max(1, steps // 3) == 0:
            lines.append({"step": step, "epoch": 0, "val_loss": 2.0 + step / 100})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    splits = {
        name: {"rows": rows, "tokens": {"mean": 134.4, "max": 1511, "counted_rows": rows}}
        for name, rows in (("training", 3081), ("validation", 407), ("test", 389))
    }
    write_json(
        folder / "data_manifest.json",
        {
            "source": {"name": "mine.csv", "sha256": "5ac" * 8, "bytes": 2048, "columns": {"slang": "Slang"}},
            "rows_in": 5000,
            "rows_out": 3877,
            "dropped": {"explicit term": 1023},
            "merged": 100,
            "repaired": 2,
            "splits": splits,
        },
    )
    write_json(
        folder / "environment.json",
        {
            "command": "python -m commands.train task=slang",
            "commit": "c0ffee",
            "python": "3.11.7",
            "packages": {"torch": "2.13.0"},
            "cpu": "A Processor",
            "cores": 2,
            "memory_gib": 23.5,
            "gpus": [],
        },
    )
    write_json(
        folder / "evaluation.json",
        {
            "held_out_rows": 389,
            "questions": ["Make a word for a party. Be brief.", "Make a word for the rain. Be brief."],
            "before": {"loss": 3.7832, "perplexity": 43.955, "answers": ["-\n-\n-", "rain rain"]},
            "after": {
                "loss": 2.896,
                "perplexity": 18.102,
                "answers": ["Slang: mashup\nDefinition: A mix.", "Slang: drip"],
            },
            "finished": "2026-11-21T10:20:30+00:00",
        },
    )
    member = yaml.safe_dump({"base": {"name": "gemma-3-270m", "revision": "5e1ec7ed", "sha256": "ba5eba11"}}).encode()
    with tarfile.open(folder / "slang.nemo", "w") as tar:
        info = tarfile.TarInfo("./model_config.yaml")
        info.size = len(member)
        tar.addfile(info, io.BytesIO(member))
    return folder


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def change(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    how(value)
    write_json(file, value)


def page_of(run_folder: Path) -> str:
    return report.write(run_folder).read_text(encoding="utf-8")


def words_of(page: str) -> str:
    """What a reader sees, in one line."""
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a-run")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes nearly all of the time; a test about words can do without."""
    monkeypatch.setattr(report, "draw", lambda *_: {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run and its page, for the tests that only look."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "a-run")
    return folder, page_of(folder)


def test_it_shows_what_was_measured(finished: tuple[Path, str]) -> None:
    words = words_of(finished[1])
    verdict = (
        "on 389 examples it has never seen, perplexity fell from 43.95 to 18.10, 59% lower, after 2 min of training"
    )
    assert f"It improved: {verdict}." in words
    for fact in [
        "3.783 before and 2.896 after",
        "5,000 rows in, 3,877 kept",
        "100 merged",
        "1,023 dropped",
        "3,081 training examples, 3 epochs",
        "134 mean, 1,511 longest",
        "dropped: explicit term",
        "Slang: mashup",
        "rain rain",
        "Make a word for the rain",
        "A Processor",
        "c0ffee",
        "5e1ec7ed",
        "ba5eba11",
        "GPUs none",
        "530 tokens/s",
        "lowest, 2.200, at step 20 and is 2.600 at the end",
    ]:
        assert fact in words, fact


def test_line_breaks_of_an_answer_are_kept(finished: tuple[Path, str]) -> None:
    assert ">Slang: mashup\nDefinition: A mix.<" in finished[1]
    assert re.search(r"\.text \{[^}]*white-space: pre-wrap", finished[1])


def test_it_is_one_file_without_scripts(finished: tuple[Path, str]) -> None:
    folder, page = finished
    assert not re.search(r"<(script|link|iframe|img|image|object|embed|base)\b|@import|@font-face", page)
    loaded = re.findall(r"""\b(?:src|href)=["']?([^"'\s>]*)|url\(["']?([^"')]*)""", page)
    assert loaded and all((link or style).startswith("#") for link, style in loaded)
    assert not list(folder.glob("*.partial"))


def test_every_plot_can_be_read_out_and_no_id_stands_twice(finished: tuple[Path, str]) -> None:
    page = finished[1]
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert len(labels) == page.count("<svg ") == 8
    assert "base model: 43.95, fine-tuned: 18.10" in labels[0]
    assert "training from 3.000 to 0.050 in 60 steps; validation 2.200 at step 20, 2.400 at step 40" in labels[1]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_the_same_run_gives_the_same_bytes(finished: tuple[Path, str]) -> None:
    folder, page = finished
    assert page_of(folder) == page


@pytest.mark.usefixtures("no_plots")
def test_labels_are_shown_with_their_balance_and_matrix(run_folder: Path) -> None:
    side = {"before": [0.5, 0.3, 0.7], "after": [0.75, 0.51, 0.9], "difference": [0.25, 0.1, 0.4]}
    write_json(
        run_folder / "metrics.json",
        {
            "labels": {
                "questions": 16,
                "labels": [
                    {
                        "label": "ham & eggs",
                        "training": 30,
                        "asked": 10,
                        "before": side["before"],
                        "after": side["after"],
                    },
                    {"label": "spam", "training": 10, "asked": 6, "before": side["after"], "after": None},
                ],
                "usual": [0.625, 0.39, 0.82],
                "accuracy": side,
                "f1": side,
                "confusion_before": [[5, 3, 2], [1, 4, 1]],
                "confusion_after": [[9, 1, 0], [3, 3, 0]],
            }
        },
    )
    page = page_of(run_folder)
    words = words_of(page)
    assert (
        "Always answering “ham & eggs”, the most frequent label of the training rows, would be right for 62% of"
        in words
    )
    assert "Accuracy 50% 30% to 70% 75% 51% to 90% +25 points better +10 to +40" in words
    assert "ham & eggs 30 75% 10 50% 30% to 70% 75% 51% to 90%" in words
    assert "ham & eggs 9 1 0 spam 3 3 0" in words and "ham & eggs 5 3 2 spam 1 4 1" in words
    assert "ham &amp; eggs" in page


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("perplexity", "verdict"),
    [(60.0, "It got worse"), (43.95, "It changed little"), (math.nan, "Training diverged"), (1e300, "It got worse")],
)
def test_the_verdict_is_honest(run_folder: Path, perplexity: float, verdict: str) -> None:
    change(run_folder / "evaluation.json", lambda it: it["after"].update(perplexity=perplexity))
    words = words_of(page_of(run_folder))
    assert verdict in words and "It improved" not in words


def test_text_of_a_model_or_a_table_stays_text(run_folder: Path) -> None:
    def spoil(it: dict[str, Any]) -> None:
        it["questions"][0] = it["before"]["answers"][0] = it["after"]["answers"][1] = EVIL

    change(run_folder / "evaluation.json", spoil)
    change(run_folder / "data_manifest.json", lambda it: it["source"].update(name=EVIL, columns={EVIL: EVIL}))
    change(run_folder / "data_manifest.json", lambda it: it.update(dropped={EVIL: 3}))
    change(run_folder / "environment.json", lambda it: it.update(command=EVIL))
    page = page_of(run_folder)
    assert "<script" not in page
    assert words_of(page).count(EVIL) >= 6


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "long", steps=20_000))
    assert len(page) < 400_000
    assert "training, mean of 50" in words_of(page)


def test_one_step_is_a_run(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "short", steps=1))
    assert "2 s training, 1 step " in words_of(page)
    assert page.count("<svg ") == 8


def test_what_a_run_lacks_is_left_out(run_folder: Path) -> None:
    for name in ("data_manifest.json", "environment.json", "slang.nemo"):
        (run_folder / name).unlink()
    (run_folder / "metrics.jsonl").write_text(
        '{"step": 1, "train_loss": 2.5}\n{"step": 2, "train_loss": NaN}\n{"step": 3, "tra'
    )
    change(run_folder / "evaluation.json", lambda it: (it.pop("questions"), it["after"].pop("answers")))
    page = page_of(run_folder)
    assert page.count("<svg ") == 2  # perplexity and loss
    assert "nan" not in words_of(page) and "None" not in words_of(page)
    (run_folder / "metrics.jsonl").unlink()
    assert page_of(run_folder).count("<svg ") == 1


@pytest.mark.usefixtures("no_plots")
def test_of_a_step_taken_twice_the_later_counts(run_folder: Path) -> None:
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "epoch": 2, "val_loss": 2.9}\n{"step": 60, "train_loss": 1.0, "seconds": 2.0}\n')
    words = words_of(page_of(run_folder))
    assert "and is 2.900 at the end" in words
    assert "training, 60 steps" in words and "2 min of training" in words


def test_the_newest_finished_run_is_found_or_the_one_named(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    old, new = write_run(runs / "slang" / "z-old", steps=1), write_run(runs / "slang" / "a-new", steps=1)
    (runs / "slang" / "unfinished").mkdir()
    os.utime(old / "evaluation.json", (1, 1))
    words = ["task=slang", f"runs_dir={runs}"]
    assert newest_run(load_config(words)) == new
    assert newest_run(load_config([*words, f"run={old}"])) == old


def test_without_a_finished_run_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make train TASK=slang"):
        report_command.main(["task=slang", f"runs_dir={tmp_path}"])
    with pytest.raises(UserError, match="not a finished run"):
        report_command.main(["task=slang", f"+run={tmp_path}"])
