"""Progress of a run: a live line in the terminal, `metrics.jsonl`, TensorBoard and W&B."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from core.artifacts import MetricsLine
from core.files import write_whole
from training.batches import Step
from training.checkpoints import check_finite
from training.flops import bf16_peak, flops_of

FIRST_STEPS, FIRST_SECONDS = 3, 20.0  # after one of which, beyond the first step, the run's time is told
LONG, SHORT = 15 * 60, 10 * 60  # seconds: beyond which a way to shorten it is told, and to what


class RunProgress(Callback):
    """Writes metrics every `task.train.log_every` steps and after each validation.

    `metrics.jsonl` and the trainer's loggers (TensorBoard, W&B) get the same values. A training line is `{"step",
    "epoch", "train_loss", "learning_rate", "grad_norm"}` of its step and, over the `"steps"` since the previous line,
    `"seconds"`, `"tokens_per_second"` (of all samples, over all processes), `"padding"` (its fraction of the computed
    tokens), `"memory_gib"`, and on a GPU whose peak is known `"mfu"`, the model FLOPs utilization. A validation line is
    `{"step", "epoch", "val_loss"}`. A resumed run drops the lines of the steps that it repeats.

    After the first steps it prints how long all of them will take.

    Args:
        metrics_file: appended to.
        steps: of the whole run.
        every: steps between two training lines.
        rows: of an epoch.
        tokens: that the run computes: of all epochs, and half of the validations', which have no backward pass.
    """

    def __init__(
        self, metrics_file: Path, steps_per_epoch: int, steps: int, every: int, rows: int, tokens: float
    ) -> None:
        self.metrics_file, self.steps_per_epoch, self.steps, self.every = metrics_file, steps_per_epoch, steps, every
        self.rows, self.all_tokens = rows, tokens
        self.last_shown = 0.0
        self.told = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and self.metrics_file.exists():
            lines = self.metrics_file.read_text().splitlines()
            kept = [line for line in lines if _is_before(line, trainer.global_step)]
            write_whole(self.metrics_file, "".join(f"{line}\n" for line in kept))
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            disable=not (trainer.is_global_zero and sys.stderr.isatty()),
        )
        self.first_step = trainer.global_step
        self.steps_since_first = self.tokens_since_first = 0
        self.first_ended = time.monotonic()
        self.bar.start()
        self.task = self.bar.add_task("", total=self.steps, completed=trainer.global_step, status="")
        self.peak = bf16_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.started = time.monotonic()
        self._start_line()

    def _start_line(self) -> None:
        self.line_started = time.monotonic()
        self.line_steps = self.tokens = self.packed = self.computed = 0
        self.flops = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        self._tell_time(trainer, batch)
        self.line_steps += 1
        self.tokens += batch.tokens
        self.packed += sum(segment.length for part in batch.micro_batches for segment in part.layout.segments)
        self.computed += sum(part.input_ids.numel() for part in batch.micro_batches)
        if self.peak:
            self.flops += _flops(module, batch)
        step = trainer.global_step
        if step % self.every and step != self.steps:
            return
        check_finite(trainer)
        if not trainer.is_global_zero:
            self._start_line()
            return
        values = {name: float(trainer.callback_metrics[name]) for name in ("train_loss", "learning_rate", "grad_norm")}
        seconds = time.monotonic() - self.line_started
        speed = self.tokens / seconds
        metrics = {
            "tokens_per_second": round(speed, 1),
            "padding": round(1 - self.packed / self.computed, 4),
            "memory_gib": round(memory_gib(), 3),
        }
        if self.peak:
            metrics["mfu"] = round(self.flops / seconds / self.peak, 4)
        self._write(trainer, {**values, **metrics, "steps": self.line_steps, "seconds": round(seconds, 4)})
        status = f"loss {values['train_loss']:.3f}  {speed:,.0f} tokens/s"
        self.bar.update(self.task, completed=step, status=status)
        if not sys.stderr.isatty() and time.monotonic() - self.last_shown > 15:
            self.last_shown = time.monotonic()
            left = (self.last_shown - self.started) / (step - self.first_step) * (self.steps - step)
            print(f"step {step}/{self.steps}  {status}  {left:.0f} s left", file=sys.stderr)
        self._start_line()

    def _tell_time(self, trainer: Trainer, batch: Step) -> None:
        """Print once how long the run takes, when it is known: the first step, which is slower, does not count."""
        if self.told or not trainer.is_global_zero:
            return
        if trainer.global_step == self.first_step + 1:
            self.first_ended = time.monotonic()
            return
        self.steps_since_first += 1
        self.tokens_since_first += batch.tokens
        seconds = time.monotonic() - self.first_ended
        if self.steps_since_first < FIRST_STEPS and seconds < FIRST_SECONDS:
            return
        self.told = True
        whole = seconds / self.tokens_since_first * self.all_tokens
        if self.first_step:
            left = whole * (self.steps - trainer.global_step) / self.steps
            said = f"About {_minutes(left)} of training are left"
        else:
            alone = trainer.world_size == 1 and not torch.cuda.is_available()
            epochs = round(self.steps / self.steps_per_epoch)
            said = f"Training takes about {_minutes(whole)}" + (shorter(whole, self.rows, epochs) if alone else "")
        self._say(said)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            loss = float(trainer.callback_metrics["val_loss"])
            self._write(trainer, {"val_loss": loss})
            step, epoch = trainer.global_step, trainer.global_step / self.steps_per_epoch
            self._say(f"step {step}/{self.steps}, epoch {epoch:.3g}: validation loss {loss:.3f}")
        took = time.monotonic() - self.validation_started  # validation is not training time
        self.line_started += took
        self.first_ended += took

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()

    def _say(self, text: str) -> None:
        """Print a line above the bar."""
        if sys.stderr.isatty():
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _write(self, trainer: Trainer, values: dict[str, float]) -> None:
        step = trainer.global_step
        epoch = max(0, step - 1) // self.steps_per_epoch
        with self.metrics_file.open("a") as file:
            file.write(MetricsLine.model_validate({"step": step, "epoch": epoch, **values}).to_line())
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": epoch, **values}, step=step)


def shorter(seconds: float, rows: int, epochs: int) -> str:
    """How to make a training that takes `seconds` one of about ten minutes, for the end of a sentence; "" where it is
    not long.

    Args:
        rows: of an epoch.
        epochs: of the training.
    """
    if seconds <= LONG:
        return ""
    share = SHORT / seconds
    ways = [f"task.data.train_rows={_two_digits(rows * share)}"]
    if epochs > 1 and epochs * share < 1:
        ways.append(f"task.train.epochs=1 task.data.train_rows={_two_digits(rows * epochs * share)}")
    elif epochs > 1:
        ways.append(f"task.train.epochs={int(epochs * share)}")
    said = ", or ".join(f'ARGS="{way}"' for way in ways)
    return f". A run of about {SHORT // 60} minutes, which learns less: {said}"


def _two_digits(number: float) -> int:
    """`number` rounded down to two digits, at least 1."""
    unit = 10 ** max(0, len(str(int(number))) - 2)
    return max(1, int(number) // unit * unit)


def _minutes(seconds: float) -> str:
    """A time in words: `40 seconds`, `14 minutes`, `2.5 hours`."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.95 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.0f} seconds"


def _flops(module: Any, batch: Step) -> float:
    """FLOPs of this process's share of a step."""
    config, lora = module.model.get_base_model().config, module.model.peft_config["default"]
    adapters = lora.r, lora.target_modules or (), lora.target_parameters or ()
    return sum(flops_of(config, part.lengths, len(part.targets), *adapters).total for part in batch.micro_batches)


def memory_gib() -> float:
    """Memory that this process holds now, in GiB: of the GPU where there is one, else main memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved() / 2**30
    return _main_memory("VmRSS:")


def peak_memory_gib() -> float:
    """Peak memory of this process, in GiB, likewise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    # Not getrusage's ru_maxrss: that starts from the memory of the parent process.
    return _main_memory("VmHWM:")


def _main_memory(name: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[0]) / 2**20


def _is_before(line: str, step: int) -> bool:
    """Whether a line was written before the checkpoint of `step`, which comes before that step's validation."""
    try:
        values = json.loads(line)
    except ValueError:  # a kill cut the line short
        return False
    return values["step"] < step or (values["step"] == step and "train_loss" in values)
