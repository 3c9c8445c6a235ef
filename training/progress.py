"""What a person and a plot see of a run: a live line in the terminal, a line a step in `metrics.jsonl`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.batches import Step


class RunProgress(Callback):
    """Loss, tokens per second and time left over the whole run, epochs included.

    `metrics.jsonl` gets `{"step", "epoch", "train_loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds"}`
    a step and `{"step", "epoch", "val_loss"}` a validation. A resumed run drops the lines of steps it takes again.
    """

    def __init__(self, metrics_file: Path) -> None:
        self.metrics_file = metrics_file
        self.last_said = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and self.metrics_file.exists():
            lines = self.metrics_file.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= trainer.global_step]
            self.metrics_file.write_text("".join(f"{line}\n" for line in kept))
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            disable=not (trainer.is_global_zero and sys.stderr.isatty()),
        )  # fmt: skip
        self.total_steps = int(trainer.estimated_stepping_batches)
        self.first_step = trainer.global_step
        self.bar.start()
        self.task = self.bar.add_task("", total=self.total_steps, completed=trainer.global_step, facts="")
        self.began = self.step_began = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Step, batch_idx: int) -> None:
        self.step_began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        values = {name: float(trainer.callback_metrics[name]) for name in ("train_loss", "learning_rate", "grad_norm")}
        tokens = float(trainer.callback_metrics["tokens"])
        seconds = time.monotonic() - self.step_began
        speed = tokens / seconds
        self._write(trainer, {**values, "tokens_per_second": round(speed, 1), "seconds": round(seconds, 4)})
        facts = f"loss {values['train_loss']:.3f}  {speed:,.0f} tokens/s"
        self.bar.update(self.task, completed=trainer.global_step, facts=facts)
        if not sys.stderr.isatty() and time.monotonic() - self.last_said > 15:
            self.last_said = time.monotonic()
            done = trainer.global_step - self.first_step
            left = (self.last_said - self.began) / done * (self.total_steps - trainer.global_step)
            print(f"step {trainer.global_step}/{self.total_steps}  {facts}  {left:.0f} s left", file=sys.stderr)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["val_loss"])
            self._write(trainer, {"val_loss": loss})
            say = self.bar.console.print if sys.stderr.isatty() else print
            say(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: validation loss {loss:.3f}")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()

    def _write(self, trainer: Trainer, values: dict[str, float]) -> None:
        line = {"step": trainer.global_step, "epoch": trainer.current_epoch, **values}
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the line a kill cut in half
        return float("inf")
