"""Checkpoints that survive anything.

A checkpoint is one file, `step=000120-<hash of its bytes>.ckpt`: written under another name, synced, then renamed, so
it is there whole or not at all, and a byte that changed later shows. It always stands for the moment after a step and
before the validation that may follow it, and its counters are a function of that step alone; so going on from any of
them takes the same course as never having stopped. `best-step=…` is the one with the lowest validation loss.
"""

import hashlib
import io
import math
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from core.errors import UserError
from core.files import commit
from training.stopping import Stopped, StopSignals

CHECKPOINTS_PER_RUN = 20
KEEP = 3  # of the last ones: should the newest be damaged, there are others


class Checkpoints(Checkpoint):
    """Writes checkpoints: some over the run, one at its end, the best by validation loss, one when told to stop."""

    def __init__(
        self, folder: Path, steps: int, made_of: dict[str, Any], signals: StopSignals, keep_best: bool = False
    ) -> None:
        """`steps`: of the whole run. `made_of`: what the run is, kept in each checkpoint. `keep_best`: end with the
        best weights, not with the last."""
        self.folder, self.steps, self.made_of, self.signals, self.keep_best = folder, steps, made_of, signals, keep_best
        self.every = max(1, steps // CHECKPOINTS_PER_RUN)
        self.saved = 0
        self.best_step, self.best_loss = 0, math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_step, self.best_loss = state_dict["best_step"], state_dict["best_loss"]

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning counts in the middle of a step or of a validation, and a run resumed there would skip or repeat
        # one. Counters of a step that is done, and of a validation that has not begun:
        loops = checkpoint["loops"]["fit_loop"]
        loops["epoch_loop.batch_progress"] = _counters(trainer.global_step) | {"is_last_batch": False}
        loops["epoch_loop.val_loop.batch_progress"] = _counters(0) | {"is_last_batch": False}
        loops["epoch_progress"] = _counters(0, begun=1)  # the one epoch is under way
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step
        checkpoint["made_of"] = self.made_of
        checkpoint.pop(module.CHECKPOINT_HYPER_PARAMS_KEY, None)  # config.yaml holds them; these are Python objects
        checkpoint.pop(module.CHECKPOINT_HYPER_PARAMS_TYPE, None)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.signals.listen()  # Lightning has put its own handler there
        self.saved = trainer.global_step
        self._leave_if_told(trainer)
        self._validate_at_the_end(trainer)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._leave_if_told(trainer)
        if trainer.global_step % self.every == 0 or trainer.global_step == self.steps:
            self._save(trainer)
        self._validate_at_the_end(trainer)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._leave_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        loss = float(trainer.callback_metrics["val_loss"])
        if loss < self.best_loss:
            self.best_step, self.best_loss = trainer.global_step, loss
            self._write(trainer, "best-", 1)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.keep_best:
            return
        best = next((path for path in self.folder.glob(f"best-{_name(self.best_step)}-*.ckpt") if is_whole(path)), None)
        if best is None:
            raise UserError(
                f"the best checkpoint (step {self.best_step}) in {self.folder} is missing or damaged. Delete that "
                "folder to train again"
            )
        strategy = trainer.strategy
        strategy.load_model_state_dict(strategy.load_checkpoint(best), strict=module.strict_loading)

    def _validate_at_the_end(self, trainer: Trainer) -> None:
        if trainer.global_step == self.steps:  # Lightning validates at multiples of val_check_interval only
            trainer.val_check_batch = self.steps

    def _leave_if_told(self, trainer: Trainer) -> None:
        told = bool(self.signals.received)
        if trainer.world_size > 1:  # one process may have been told alone; all leave after the same step
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told:
            self._save(trainer)
            step = trainer.global_step
            raise Stopped(f"after step {step}; checkpoint written", self.signals.received or "another process")

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step > self.saved:
            check_finite(trainer)
            self._write(trainer, "", KEEP)
            self.saved = trainer.global_step

    def _write(self, trainer: Trainer, prefix: str, keep: int) -> None:
        partial = self.folder / "writing.partial"
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            commit(partial, self.folder / f"{prefix}{_name(trainer.global_step)}-{_hash(partial)}.ckpt")
            for old in sorted(self.folder.glob(f"{prefix}step=*.ckpt"), key=step_of)[:-keep]:
                old.unlink()
        trainer.strategy.barrier()


def check_finite(trainer: Trainer) -> None:
    """Raises a UserError when loss or gradient of the last step is not a number.

    On a GPU this waits for the step: it is asked where a step's values are read anyway, and before each checkpoint.
    """
    values = {name: float(trainer.callback_metrics[name]) for name in ("train_loss", "grad_norm")}
    for name, value in values.items():
        if not math.isfinite(value):
            what = "loss" if name == "train_loss" else "gradient norm"
            raise UserError(
                f"the {what} became {value} at step {trainer.global_step}. The last checkpoint is good; lower "
                f"task.train.learning_rate (now {float(trainer.callback_metrics['learning_rate']):.3g}) and train again"
            )


class SafeCheckpointIO(TorchCheckpointIO):
    """Reads tensors and plain values only, and lets a full disk say so (torch's own writer does not)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with Path(path).open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            Path(path).unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path: Any, map_location: Any = "cpu") -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)


def newest_checkpoint(folder: Path, say: bool = True) -> Path | None:
    """The last checkpoint that is whole. Damaged ones after it are named aloud and removed."""
    (folder / "writing.partial").unlink(missing_ok=True)
    for path in sorted(folder.glob("step=*.ckpt"), key=step_of, reverse=True):
        if is_whole(path):
            return path
        path.unlink(missing_ok=True)
        if say:
            print(
                f"checkpoint {path.name} is damaged (its bytes do not have the hash in its name): going back to the "
                "one before"
            )
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("=")[2].partition("-")[0])


def is_whole(checkpoint: Path) -> bool:
    try:
        return checkpoint.stem.endswith(_hash(checkpoint))
    except OSError:
        return False


def _name(step: int) -> str:
    return f"step={step:06d}"


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def _counters(done: int, begun: int | None = None) -> dict[str, Any]:
    begun = done if begun is None else begun
    counts = {"ready": begun, "started": begun, "processed": done, "completed": done}
    return {"total": counts, "current": dict(counts)}
