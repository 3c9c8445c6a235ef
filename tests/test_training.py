"""The recipe as a user runs it, on a tiny random Gemma: results, and what is said when it cannot go on."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from launcher import ENVIRONMENT, Launcher

from converters.nemo_file import read_nemo
from training.progress import shorter


def arguments(source: Path, tiny_base: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"task.data.source={source}",
        f"model.path={tiny_base}",
        f"data_dir={folder}/data",
        f"runs_dir={folder}/runs",
        "task.train.epochs=3",
        "task.train.batch_size=4",
        "task.train.learning_rate=1e-2",
        "task.generate.max_new_tokens=4",
        *more,
    ]


def train(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "commands.train", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs" / "slang").iterdir()
    return run


def course(run: Path) -> list[tuple[int, int, str, float]]:
    """All that a run logged but its timings: step, epoch, which loss, and the loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = [next(kind for kind in ("train_loss", "val_loss") if kind in line) for line in lines]
    return [(line["step"], line["epoch"], kind, line[kind]) for line, kind in zip(lines, kinds, strict=True)]


def metrics(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def finished(source: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = train(arguments(source, tiny_base, folder))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(
    ("minutes", "rows", "epochs", "says"),
    [
        (14.9, 308, 3, ""),
        (25, 308, 3, 'ARGS="task.data.train_rows=120", or ARGS="task.train.epochs=1"'),
        (16, 1250, 10, 'ARGS="task.data.train_rows=780", or ARGS="task.train.epochs=6"'),
        (100, 308, 3, 'ARGS="task.data.train_rows=30", or ARGS="task.train.epochs=1 task.data.train_rows=92"'),
        (6000, 48, 1, 'ARGS="task.data.train_rows=1"'),
    ],
)
def test_a_long_training_says_how_to_make_it_one_of_ten_minutes(
    minutes: float, rows: int, epochs: int, says: str
) -> None:
    said = shorter(minutes * 60, rows, epochs)
    assert said == (f". A run of about 10 minutes, which learns less: {says}" if says else "")
    for given in re.findall(r'ARGS="([^"]*)"', said):  # what it recommends takes that long
        values = dict(word.split("=") for word in given.split())
        share = int(values.get("task.data.train_rows", rows)) / rows * int(values.get("task.train.epochs", epochs))
        assert minutes * share / epochs <= 10 or values == {"task.data.train_rows": "1"}


@pytest.mark.slow
def test_a_run_folder_has_what_the_next_stage_needs(finished: Path) -> None:
    run = only_run(finished)
    for name in (
        "config.yaml",
        "environment.json",
        "data_manifest.json",
        "metrics.jsonl",
        "evaluation.json",
        "report.html",
    ):
        assert (run / name).stat().st_size > 0, name
    nemo = read_nemo(run / "slang.nemo")
    assert nemo.prompt.instruction == "{tag}{context}{condition}"
    assert nemo.base["sha256"] and len(nemo.adapter) == 2 * 7 * 3
    assert all(tensor.dtype == torch.float32 for tensor in nemo.adapter.values())
    losses = metrics(run, "train_loss")
    assert losses[-1] < losses[0] - 0.5
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["after"]["perplexity"] < evaluation["before"]["perplexity"]


@pytest.mark.slow
def test_nemo_restores_its_own_archive(finished: Path) -> None:
    from training.gemma_lora import GemmaLoRA

    archive = only_run(finished) / "slang.nemo"
    model = GemmaLoRA.restore_from(str(archive), map_location="cpu")
    restored, saved = model.state_dict(), read_nemo(archive).adapter
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)


@pytest.mark.slow
def test_a_finished_run_is_shown_and_not_repeated(finished: Path, source: Path, tiny_base: Path) -> None:
    archive = only_run(finished) / "slang.nemo"
    written = archive.stat().st_mtime_ns
    result = train(arguments(source, tiny_base, finished))
    assert result.returncode == 0 and "is finished" in result.stdout and str(archive) in result.stdout
    assert "Loading NeMo" not in result.stdout  # which takes some seconds
    assert archive.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_the_run(
    launcher: Launcher, source: Path, tiny_base: Path, tmp_path: Path
) -> None:
    words = arguments(source, tiny_base, tmp_path, "task.train.learning_rate=1e30", "task.train.clip=1e30")
    training = launcher.start(words, tmp_path)
    assert training.end() == 2
    assert "the loss became" in training.said and "learning_rate" in training.said
    assert "Traceback" not in training.said
    assert not (only_run(tmp_path) / "slang.nemo").exists()


@pytest.mark.slow
def test_two_commands_cannot_train_the_same_run(
    launcher: Launcher, source: Path, tiny_base: Path, tmp_path: Path
) -> None:
    words = arguments(source, tiny_base, tmp_path)
    first = launcher.start(words, tmp_path / "first")
    first.wait_until(lambda: list(tmp_path.glob("runs/slang/*/environment.json")))
    first.send(signal.SIGSTOP)  # or it may have ended before the second looks
    second = train(words)
    first.send(signal.SIGCONT)
    assert second.returncode == 2 and "another process is training" in second.stderr
    assert first.end() == 0, first.said


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("task=nosuch", "unknown task 'nosuch'. Known: chat"),
        ("model=gemma-9-1b", "unknown model 'gemma-9-1b'"),
        ("task.train.epoch=3", "epoch"),
        ("task.data.source=/no/such.csv", "/no/such.csv"),
        ("task.evaluate.questions=[{contxt: a}]", "the prompt has no field contxt. Known: condition, context, tag"),
    ],
)
def test_an_invalid_argument_gives_one_sentence(word: str, says: str, tmp_path: Path, tiny_base: Path) -> None:
    result = train([f"model.path={tiny_base}", f"data_dir={tmp_path}/data", word])
    assert result.returncode == 2
    assert says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("word", "known"), [("TASK=nosuch", "slang"), ("MODEL=gemma", "gemma-3-270m"), ("PEFT=x", "lora")]
)
def test_make_lists_known_names_before_anything_is_installed(word: str, known: str) -> None:
    result = subprocess.run(["make", "train", word], cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert result.returncode == 2
    assert f"{word} is unknown. Known:" in result.stderr and known in result.stderr


def test_make_refuses_a_misspelt_variable() -> None:
    result = subprocess.run(["make", "train", "SORCE=my.csv"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "SORCE is no variable of this Makefile. Known: TASK" in result.stderr and " SOURCE " in result.stderr
