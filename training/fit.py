"""The training of one run: a Lightning trainer with NeMo's exp_manager around `GemmaLoRA`, resumed where it stopped."""

import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

from core.configuration import plain
from core.errors import UserError
from core.files import writing
from core.load_model import load_tokenizer
from core.prompt import Prompt
from core.schema import Config, TrainConfig
from training.batches import Batches, Step, tokenize
from training.checkpoints import Checkpoints, SafeCheckpointIO, newest_checkpoint, step_of
from training.distribute import AdapterParallel
from training.fingerprint import check_checkpoint, run_fingerprint
from training.gemma_lora import GemmaLoRA, available_optimizer, model_settings, nemo_config
from training.progress import RunProgress
from training.signals import Stopped, StopSignals


class TrainingSchedule:
    """The steps of all epochs as one epoch of Lightning's, which cannot resume exactly between two."""

    def __init__(self, batches: Batches, epochs: int) -> None:
        self.batches, self.epochs = batches, epochs

    def __len__(self) -> int:
        return len(self.batches) * self.epochs

    def __iter__(self) -> Iterator[Step]:
        for _ in range(self.epochs):  # a resumed run has fewer left; Lightning counts
            yield from self.batches


def fit_folders(config: Config, run_folder: Path, base_folder: Path, data_folder: Path) -> None:
    """`fit` in one of several worker processes, which reads data and prompt from the folders first."""
    tokenizer = load_tokenizer(base_folder)
    prompt = Prompt(**plain(config.task.prompt))
    training, validation = (
        tokenize(
            data_folder / f"{name}.jsonl",
            tokenizer,
            prompt,
            config.task.train.max_length,
            cache=data_folder / ".tokens",
        )[0]
        for name in ("training", "validation")
    )
    archive, fingerprint = run_folder / f"{config.task.name}.nemo", run_fingerprint(config, base_folder, data_folder)
    fit(config, base_folder, training, validation, run_folder, archive, fingerprint, StopSignals())


def fit(
    config: Config,
    base_folder: Path,
    samples: Dataset,
    validation_samples: Dataset,
    run_folder: Path,
    archive: Path,
    fingerprint: dict[str, Any],
    signals: StopSignals,
) -> None:
    """Train, or resume from the newest intact checkpoint, and write `archive`.

    Args:
        samples, validation_samples: as `batches.tokenize` returns them.
        run_folder: gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
        archive: the `.nemo` to write: the last weights, or with early stopping those of the lowest validation loss.
        fingerprint: of the run; a checkpoint with another one is refused.

    Raises:
        Stopped: by a signal, after a step; its checkpoint is written.
        UserError: a checkpoint of another run, a loss that is not a finite number, W&B that is not set up.
    """
    seed_everything(config.seed, verbose=False)
    settings = config.task.train
    size, budget = settings.batch_size * settings.accumulation, config.trainer.micro_batch_tokens
    batches = Batches(samples, size, budget, config.seed)
    schedule = TrainingSchedule(batches, settings.epochs)
    steps = len(schedule)
    checkpoints = run_folder / "checkpoints"
    validate_every = min(steps, steps_per_validation(settings, samples, len(batches)))
    validated = sum(validation_samples["length"]) * (steps // validate_every)
    progress = RunProgress(
        run_folder / "metrics.jsonl",
        len(batches),
        steps,
        settings.log_every,
        rows=len(samples),
        tokens=sum(samples["length"]) * settings.epochs + validated / 2,
    )
    callbacks: list[Callback] = [progress]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStopping("val_loss", patience=settings.early_stopping, check_on_train_epoch_end=False))
    callbacks.append(
        Checkpoints(checkpoints, steps, fingerprint, signals, keep_best=settings.early_stopping is not None)
    )
    processes = config.trainer.devices * config.trainer.num_nodes
    kind = "ddp" if config.trainer.strategy == "auto" else config.trainer.strategy
    strategy = AdapterParallel(kind) if processes > 1 else "auto"
    trainer = Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy,
        inference_mode=processes == 1,  # weights gathered in inference mode cannot be trained with again
        max_epochs=1,  # see TrainingSchedule
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        plugins=[SafeCheckpointIO()],
        logger=False,  # exp_manager creates the loggers
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    batches.steps_taken = lambda: trainer.global_step
    rank, world = strategy.share if isinstance(strategy, AdapterParallel) else (0, 1)
    batches.rank, batches.world_size = rank, world
    validation = Batches(validation_samples, size, budget, None, rank=rank, world_size=world)
    # One process chooses for all, as it removes damaged ones.
    resume_from = trainer.strategy.broadcast(newest_checkpoint(checkpoints) if trainer.is_global_zero else None)
    first = 0
    if resume_from:
        check_checkpoint(resume_from, fingerprint)
        first = step_of(resume_from)
        if trainer.is_global_zero:
            print(f"Resuming from step {first} of {steps}")
    exp_manager(
        trainer,
        {
            "explicit_log_dir": str(run_folder / "tensorboard"),
            "name": config.task.name,
            # Drops what an interrupted run logged after its checkpoint.
            "summary_writer_kwargs": {"purge_step": first + 1},
            "create_checkpoint_callback": False,  # `Checkpoints` writes them, each whole or not at all
            "disable_validation_on_resume": False,  # it may have been due when the run was interrupted
            "log_step_timing": False,
            "log_tflops_per_sec_per_gpu": False,
            **wandb_settings(config, run_folder),
        },
    )
    model = GemmaLoRA(training_config(config, base_folder, steps), trainer)
    signals.in_training = True
    try:
        trainer.fit(model, schedule, validation, ckpt_path=resume_from)
    finally:
        signals.in_training = False
        signals.listen()
    if signals.received:
        raise Stopped(f"after step {trainer.global_step}, the last; checkpoint written", signals.received)
    if trainer.is_global_zero:
        with writing(archive) as partial:
            model.save_to(str(partial))


def training_config(config: Config, base_folder: Path, steps: int) -> DictConfig:
    """What a `GemmaLoRA` that is to be trained for `steps` steps is made of."""
    settings, peft = config.task.train, plain(config.peft)
    return nemo_config(
        {
            **model_settings(base_folder, peft, plain(config.task.prompt), config.seed),
            "quantization": peft["quantization"],
            "gradient_checkpointing": settings.gradient_checkpointing,
            **({"table_in_main_memory": True} if config.trainer.table_in_main_memory else {}),
            "clip": settings.clip,
            "optim": {
                "name": available_optimizer(settings.optimizer, config.trainer.accelerator),
                "lr": settings.learning_rate,
                "weight_decay": settings.weight_decay,
                "betas": [0.9, 0.999],
                "sched": {
                    "name": settings.schedule,
                    "max_steps": steps,
                    "warmup_steps": math.ceil(settings.warmup_ratio * steps),
                    "min_lr": 0.0,
                },
            },
        }
    )


def steps_per_validation(settings: TrainConfig, samples: Dataset, steps_per_epoch: int) -> int:
    """Steps between two validations: `evaluate_every`, or about `evaluate_every_tokens` tokens, or one epoch."""
    if settings.evaluate_every and settings.evaluate_every_tokens:
        raise UserError("give one of task.train.evaluate_every and task.train.evaluate_every_tokens, not both")
    if settings.evaluate_every_tokens:
        return max(1, round(settings.evaluate_every_tokens * steps_per_epoch / sum(samples["length"])))
    return settings.evaluate_every or steps_per_epoch


def wandb_settings(config: Config, run_folder: Path) -> dict[str, Any]:
    """exp_manager's options for Weights & Biases: none, and nothing is sent there, unless `trainer.wandb=true`.

    Raises:
        UserError: the package is missing, or there is neither a key nor WANDB_MODE=offline.
    """
    if not config.trainer.wandb:
        return {}
    if importlib.util.find_spec("wandb") is None:
        raise UserError("trainer.wandb=true needs the wandb package: .venv/bin/uv pip install --python .venv wandb")
    if os.environ.get("WANDB_MODE", "online") == "online" and not os.environ.get("WANDB_API_KEY"):
        raise UserError(
            "trainer.wandb=true needs your key in the environment: export WANDB_API_KEY=… (from wandb.ai/authorize), "
            "or WANDB_MODE=offline to log into the run folder"
        )
    name = run_folder.name
    kwargs = {"project": f"{config.task.name}-gemma", "name": name, "id": name, "resume": "allow"}
    return {"create_wandb_logger": True, "wandb_logger_kwargs": kwargs}
