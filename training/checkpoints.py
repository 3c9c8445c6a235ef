"""Checkpoints that survive a kill at any moment.

A checkpoint is one file, `step=000120-<hash of its bytes>.ckpt`: written under another name, synced, then renamed, so
it is there whole or not at all, and a byte that changes later is detected. It always captures the moment after a step
and before the validation that may follow it, and its counters are a function of that step alone; so resuming from any
of them gives the same result as an uninterrupted run. `best-step=…` is the one with the lowest validation loss.
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
from training.fingerprint import CHECKPOINT_KEY
from training.signals import Stopped, StopSignals

CHECKPOINTS_PER_RUN = 20
KEEP = 3  # of the last ones: should the newest be damaged, there are others


class Checkpoints(Checkpoint):
    """Writes checkpoints: at regular steps, at the end, at the lowest validation loss, and on a stop signal.

    Args:
        folder: of the checkpoints.
        steps: optimizer steps of the whole run.
        fingerprint: of the run (`fingerprint.run_fingerprint`), stored in each checkpoint.
        signals: checked after each step and each validation batch.
        keep_best: end with the weights of the lowest validation loss, not with the last.
    """

    def __init__(
        self, folder: Path, steps: int, fingerprint: dict[str, Any], signals: StopSignals, keep_best: bool = False
    ) -> None:
        self.folder, self.steps, self.fingerprint, self.signals = folder, steps, fingerprint, signals
        self.keep_best = keep_best
        self.every = max(1, steps // CHECKPOINTS_PER_RUN)
        self.saved = 0
        self.best_step, self.best_loss = 0, math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_step, self.best_loss = state_dict["best_step"], state_dict["best_loss"]

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning's counters are those of the middle of a step or of a validation, and a run resumed there would skip
        # or repeat one. These are the counters of a finished step and of a validation that has not started:
        loops = checkpoint["loops"]["fit_loop"]
        loops["epoch_loop.batch_progress"] = _counters(trainer.global_step) | {"is_last_batch": False}
        loops["epoch_loop.val_loop.batch_progress"] = _counters(0) | {"is_last_batch": False}
        loops["epoch_progress"] = _counters(0, begun=1)  # the only epoch has started
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step
        checkpoint[CHECKPOINT_KEY] = self.fingerprint
        checkpoint.pop(module.CHECKPOINT_HYPER_PARAMS_KEY, None)  # they are in config.yaml; these are Python objects
        checkpoint.pop(module.CHECKPOINT_HYPER_PARAMS_TYPE, None)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.signals.listen()  # Lightning has installed its own handlers
        self.saved = trainer.global_step
        self._stop_if_signalled(trainer)
        self._schedule_last_validation(trainer)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._stop_if_signalled(trainer)
        if trainer.global_step % self.every == 0 or trainer.global_step == self.steps:
            self._save(trainer)
        self._schedule_last_validation(trainer)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._stop_if_signalled(trainer)

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

    def _schedule_last_validation(self, trainer: Trainer) -> None:
        if trainer.global_step == self.steps:  # Lightning validates at multiples of val_check_interval only
            trainer.val_check_batch = self.steps

    def _stop_if_signalled(self, trainer: Trainer) -> None:
        stop = bool(self.signals.received)
        if trainer.world_size > 1:  # only one process may have the signal; all stop after the same step
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
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
    """Check the loss and the gradient norm of the last step.

    On a GPU this waits for the step, so it is called where a step's values are read anyway, and before each checkpoint.

    Raises:
        UserError: one of them is not a finite number.
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
    """Reads tensors and plain values only, and raises on a full disk (torch's own writer does not)."""

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
    """The last intact checkpoint, or None. Damaged ones after it are removed, and printed unless `say` is false."""
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
