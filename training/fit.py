"""One run's training: a Lightning trainer with NeMo's exp_manager around `GemmaLoRA`, resumed where it stopped."""

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
from omegaconf import DictConfig, OmegaConf

from core.base_model import describe
from core.configuration import plain
from core.errors import UserError
from core.files import writing
from core.load_model import load_tokenizer
from core.prompt import Prompt
from training.batches import Batches, Step, tokenize
from training.checkpoints import Checkpoints, SafeCheckpointIO, newest_checkpoint, step_of
from training.distribute import AdapterParallel
from training.gemma_lora import GemmaLoRA, optimizer_here, weights_dtype
from training.identity import made_of, refuse_other
from training.progress import RunProgress
from training.stopping import Stopped, StopSignals


class AllEpochs:
    """The steps of a whole run as one epoch of Lightning's, which cannot resume exactly between two."""

    def __init__(self, batches: Batches, epochs: int) -> None:
        self.batches, self.epochs = batches, epochs

    def __len__(self) -> int:
        return len(self.batches) * self.epochs

    def __iter__(self) -> Iterator[Step]:
        for _ in range(self.epochs):  # fewer are left when resumed; Lightning counts
            yield from self.batches


def fit_folders(config: DictConfig, run_folder: Path, base_folder: Path, data_folder: Path) -> None:
    """`fit` for one of several processes, which have nothing in memory yet."""
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
    archive, identity = run_folder / f"{config.task.name}.nemo", made_of(config, base_folder, data_folder)
    fit(config, base_folder, training, validation, run_folder, archive, identity, StopSignals())


def fit(
    config: DictConfig,
    base_folder: Path,
    rows: Dataset,
    validation_rows: Dataset,
    run_folder: Path,
    archive: Path,
    identity: dict[str, Any],
    signals: StopSignals,
) -> None:
    """Train, or go on from the newest whole checkpoint, and write `archive`: the last weights, or with early stopping
    those of the lowest validation loss.

    Raises:
        Stopped: by a signal, after a step; its checkpoint is written.
        UserError: a checkpoint of another run, a loss that is no number, W&B that is not set up.
    """
    seed_everything(config.seed, verbose=False)
    settings = config.task.train
    size, budget = settings.batch_size * settings.accumulation, config.trainer.micro_batch_tokens
    batches = Batches(rows, size, budget, config.seed)
    course = AllEpochs(batches, settings.epochs)
    steps = len(course)
    checkpoints = run_folder / "checkpoints"
    progress = RunProgress(run_folder / "metrics.jsonl", len(batches), steps, settings.log_every)
    callbacks: list[Callback] = [progress]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStopping("val_loss", patience=settings.early_stopping, check_on_train_epoch_end=False))
    callbacks.append(Checkpoints(checkpoints, steps, identity, signals, keep_best=settings.early_stopping is not None))
    processes = config.trainer.devices * config.trainer.num_nodes
    kind = "ddp" if config.trainer.strategy == "auto" else config.trainer.strategy
    strategy = AdapterParallel(kind) if processes > 1 else "auto"
    trainer = Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy,
        inference_mode=processes == 1,  # weights gathered in inference mode could not be trained with again
        max_epochs=1,  # see AllEpochs
        val_check_interval=min(steps, steps_per_validation(settings, rows, len(batches))),
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        plugins=[SafeCheckpointIO()],
        logger=False,  # exp_manager makes the loggers
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    batches.taken = lambda: trainer.global_step
    rank, world = strategy.share if isinstance(strategy, AdapterParallel) else (0, 1)
    batches.rank, batches.world_size = rank, world
    validation = Batches(validation_rows, size, budget, None, rank=rank, world_size=world)
    # One process chooses, as it removes damaged ones.
    resume_from = trainer.strategy.broadcast(newest_checkpoint(checkpoints) if trainer.is_global_zero else None)
    first = 0
    if resume_from:
        refuse_other(resume_from, identity)
        first = step_of(resume_from)
        if trainer.is_global_zero:
            print(f"Going on from step {first} of {steps}")
    exp_manager(
        trainer,
        {
            "explicit_log_dir": str(run_folder / "tensorboard"),
            "name": config.task.name,
            "summary_writer_kwargs": {"purge_step": first + 1},  # what a stopped run logged after its checkpoint
            "create_checkpoint_callback": False,  # Checkpoints writes each whole or not at all
            "disable_validation_on_resume": False,  # the validation that was due when the run was stopped
            "log_step_timing": False,
            "log_tflops_per_sec_per_gpu": False,
            **wandb_settings(config, run_folder),
        },
    )
    peft = plain(config.peft)
    quantization = peft.pop("quantization")
    peft.pop("optimizer")  # task.train.optimizer says it
    model = GemmaLoRA(
        OmegaConf.create(
            {
                "base_folder": str(base_folder),
                "base": describe(base_folder),
                "dtype": str(weights_dtype()).removeprefix("torch."),
                "peft": peft,
                "quantization": quantization,
                "gradient_checkpointing": settings.gradient_checkpointing,
                "prompt": config.task.prompt,
                "seed": config.seed,
                "clip": settings.clip,
                "optim": {
                    "name": optimizer_here(settings.optimizer, config.trainer.accelerator),
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
        ),
        trainer,
    )
    signals.in_training = True
    try:
        trainer.fit(model, course, validation, ckpt_path=resume_from)
    finally:
        signals.in_training = False
        signals.listen()
    if signals.received:
        raise Stopped(f"after step {trainer.global_step}, the last; checkpoint written", signals.received)
    if trainer.is_global_zero:
        with writing(archive) as partial:
            model.save_to(str(partial))


def steps_per_validation(settings: DictConfig, rows: Dataset, steps_per_epoch: int) -> int:
    """`evaluate_every` steps, or those that hold about `evaluate_every_tokens`, or those of an epoch."""
    if settings.evaluate_every and settings.evaluate_every_tokens:
        raise UserError("give one of task.train.evaluate_every and task.train.evaluate_every_tokens, not both")
    if settings.evaluate_every_tokens:
        return max(1, round(settings.evaluate_every_tokens * steps_per_epoch / sum(rows["length"])))
    return settings.evaluate_every or steps_per_epoch


def wandb_settings(config: DictConfig, run_folder: Path) -> dict[str, Any]:
    """What exp_manager is told about Weights & Biases, which nothing is sent to unless `trainer.wandb=true`."""
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
