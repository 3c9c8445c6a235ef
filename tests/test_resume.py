"""Nothing is lost: a run that was killed, told to stop, or robbed of its disk ends as the one that was left alone."""

import json
import platform
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import Launcher, Training
from test_training import arguments, course, metrics, only_run

from converters.nemo_file import read_nemo
from core.artifacts import Environment
from training.checkpoints import newest_checkpoint, step_of

pytestmark = pytest.mark.slow
STEPS = 52  # 50 rows by 4, 4 epochs
RECIPE = (
    "task.train.epochs=4",
    "task.train.evaluate_every=5",
    "peft.lora_dropout=0.1",
    "task.prompt.fields.tag=x",
    "task.prompt.fields.condition=y",
)


Start = Callable[..., Training]


@pytest.fixture(scope="module")
def start(launcher: Launcher, source: Path, tiny_base: Path) -> Start:
    """Starts the training of a folder's run, see launcher.py."""

    def start(folder: Path, *words: str, **fate: Any) -> Training:
        return launcher.start([*arguments(source, tiny_base, folder, *RECIPE), *words], folder, **fate)

    return start


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    training = start(folder)
    assert training.end() == 0, training.said
    assert training.said.count("Training takes about ") == 1 and "of training are left" not in training.said
    return folder


@pytest.fixture(scope="module")
def stopped(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that SIGTERM ended after some ten steps."""
    folder = tmp_path_factory.mktemp("stopped")
    training = start(folder)
    training.wait_until(lambda: step(folder) >= 10)
    training.send(signal.SIGTERM)
    assert training.end() == 75, training.said
    last = step_of(newest(folder))
    assert (
        f"stopped by SIGTERM after step {last}; checkpoint written; run the same command to resume\n" in training.said
    )
    assert "Traceback" not in training.said and last == step(folder) < STEPS
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "copy")


def step(folder: Path) -> int:
    """The last step that the run in `folder` has logged."""
    files = list(folder.glob("runs/slang/*/metrics.jsonl"))
    lines = files[0].read_text().splitlines() if files else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def newest(folder: Path) -> Path:
    path = newest_checkpoint(only_run(folder) / "checkpoints")
    assert path
    return path


def assert_same_end(one: Path, other: Path) -> None:
    assert course(only_run(one)) == course(only_run(other))
    left, right = (read_nemo(only_run(folder) / "slang.nemo").adapter for folder in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left), "the adapters differ"


def test_twenty_kills_at_random_moments_do_not_change_the_result(
    start: Start, undisturbed: Path, tmp_path: Path
) -> None:
    chance = random.Random(20)
    folder, kills = tmp_path / "killed", 0
    moments = sorted(chance.choices(range(STEPS), k=14))
    for number in range(20):
        if number % 4 == 1:
            training = start(folder, die_in_write=chance.choice(("half", "unsynced", "unnamed")))
        elif number % 10 == 3:  # while it starts
            training = start(folder)
            training.wait_until(lambda: "Loading NeMo" in training.said)  # noqa: B023
            time.sleep(chance.uniform(0, 0.1))
        else:
            training = start(folder)
            moment = moments.pop(0)
            training.wait_until(lambda: step(folder) >= moment)  # noqa: B023
            time.sleep(chance.uniform(0, 0.1))
        if number % 4 != 1:
            training.send(signal.SIGKILL)
        ended = training.end()
        assert ended in (0, -signal.SIGKILL), training.said
        kills += ended == -signal.SIGKILL
    assert kills == 20
    training = start(folder)
    assert training.end() == 0, training.said
    assert "Resuming from step" in training.said
    assert_same_end(undisturbed, folder)
    assert not list(only_run(folder).glob("**/*.partial"))


def test_a_run_stopped_by_a_signal_resumes_exactly(start: Start, undisturbed: Path, copy: Path) -> None:
    last = step(copy)
    training = start(copy)
    assert training.end() == 0, training.said
    assert f"Resuming from step {last} of {STEPS}" in training.said
    assert_same_end(undisturbed, copy)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other forms of the kernels are of x86-64 here")
def test_a_run_that_is_resumed_on_another_form_says_so(start: Start, undisturbed: Path, copy: Path) -> None:
    training = start(copy, environment={"KERNEL_CFLAGS": "-march=x86-64-v2"})
    assert training.end() == 0, training.said
    was, now = (Environment.read(only_run(folder) / "environment.json") for folder in (undisturbed, copy))
    assert (now.kernels, now.dtype) == ("SSE", was.dtype) and was.kernels != "SSE"
    assert f"this run began with other software or hardware: kernels {was.kernels} → SSE. It goes on" in training.said
    assert "About " in training.said and " of training are left" in training.said
    losses = [loss for *_, kind, loss in course(only_run(copy)) if kind == "val_loss"]
    assert losses == pytest.approx(
        [loss for *_, kind, loss in course(only_run(undisturbed)) if kind == "val_loss"], 0.02
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_other_signals_leave_a_checkpoint_too(number: signal.Signals, code: int, start: Start, copy: Path) -> None:
    before = step(copy)
    training = start(copy)
    training.wait_until(lambda: "Resuming from" in training.said)
    training.wait_until(lambda: step(copy) > before)
    training.send(number)
    assert training.end() == code, training.said
    last = step_of(newest(copy))
    assert last >= before
    assert (
        f"stopped by {number.name} after step {last}; checkpoint written; run the same command to resume"
        in training.said
    )
    assert "Traceback" not in training.said


def test_a_signal_before_training_is_reported(start: Start, copy: Path) -> None:
    training = start(copy)
    training.wait_until(lambda: "Loading NeMo" in training.said)
    training.send(signal.SIGUSR1)
    assert training.end() == 75
    assert "stopped by SIGUSR1" in training.said and "run the same command to resume" in training.said
    assert "Traceback" not in training.said


def test_damaged_checkpoints_are_reported_and_the_previous_one_is_used(
    start: Start, undisturbed: Path, copy: Path
) -> None:
    *_, good, second, last = sorted((only_run(copy) / "checkpoints").glob("step=*.ckpt"))
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-1000])
    training = start(copy)
    assert training.end() == 0, training.said
    for damaged in (last, second):
        assert f"checkpoint {damaged.name} is damaged" in training.said
    assert f"Resuming from step {step_of(good)} " in training.said
    assert_same_end(undisturbed, copy)


def test_a_full_disk_is_reported_and_the_previous_checkpoint_is_kept(start: Start, copy: Path) -> None:
    checkpoints = only_run(copy) / "checkpoints"
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    training = start(copy, largest_file=100_000)  # a checkpoint is larger
    assert training.end() == 2
    assert "no room to write in" in training.said and "The checkpoint before is kept whole" in training.said
    assert "Traceback" not in training.said
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before


def test_a_run_is_not_resumed_with_another_fingerprint(start: Start, stopped: Path, copy: Path, tmp_path: Path) -> None:
    def refusal() -> str:
        training = start(copy)
        assert training.end() == 2 and "Traceback" not in training.said, training.said
        return training.said

    config = only_run(copy) / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("seed: 0\ndata_dir", "seed: 7\ndata_dir"))
    assert "differ: seed 7 → 0." in refusal()
    config.write_text(text)

    other = newest(copy)
    checkpoint = torch.load(other, weights_only=True)
    checkpoint["made_of"]["task.train.clip"] = 2.0
    torch.save(checkpoint, other)
    from training.checkpoints import _hash

    other.rename(other.with_name(f"step=000051-{_hash(other)}.ckpt"))
    assert "differ: task.train.clip 2.0 → 1.0." in refusal()

    rows = copy / "data" / "training.jsonl"
    rows.write_text(rows.read_text().replace("lum", "LUM"))
    assert "training.jsonl was changed after it was prepared" in refusal()


def test_a_new_run_beside_an_unfinished_one_says_what_differs(start: Start, copy: Path) -> None:
    unfinished = only_run(copy)
    training = start(copy, "task.train.learning_rate=2e-2")
    training.wait_until(lambda: "Loading NeMo" in training.said)
    training.send(signal.SIGKILL)
    training.end()
    assert f"{unfinished} is unfinished and differs: task.train.learning_rate 0.01 → 0.02. This starts another run" in (
        training.said
    )


def test_early_stopping_ends_with_the_best_weights_however_often_it_was_killed(start: Start, tmp_path: Path) -> None:
    # A learning rate at which the validation loss soon rises, whatever the rounding of the processor.
    words = (
        "task.train.early_stopping=1",
        "task.train.evaluate_every=null",
        "task.train.learning_rate=100.0",
        "task.train.evaluate_every_tokens=1500",
    )
    left_alone, killed = tmp_path / "left alone", tmp_path / "killed"
    training = start(left_alone, *words)
    assert training.end() == 0, training.said
    losses = metrics(only_run(left_alone), "val_loss")
    best = losses.index(min(losses))
    assert best == len(losses) - 2 and step(left_alone) < STEPS, losses
    (checkpoint,) = (only_run(left_alone) / "checkpoints").glob("best-*.ckpt")
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    adapter = read_nemo(only_run(left_alone) / "slang.nemo").adapter
    assert all(torch.equal(adapter[name], kept[name]) for name in adapter)

    for moment in (step_of(checkpoint), step(left_alone) - 1):
        training = start(killed, *words)
        training.wait_until(lambda: step(killed) >= moment)  # noqa: B023
        training.send(signal.SIGKILL)
        training.end()
    training = start(killed, *words)
    assert training.end() == 0, training.said
    assert_same_end(left_alone, killed)
