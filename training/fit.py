"""One run's training: a Lightning trainer with NeMo's exp_manager around `GemmaLoRA`, resumed where it stopped."""

import math
from pathlib import Path

from datasets import Dataset
from lightning.pytorch import Trainer, seed_everything
from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, OmegaConf

from nemo_configs.command_line import UserError, plain
from training.base_model import describe
from training.batches import Batches
from training.gemma_lora import GemmaLoRA, optimizer_here, weights_dtype
from training.progress import RunProgress

CHECKPOINTS_PER_RUN = 20


def fit(
    config: DictConfig, base_folder: Path, rows: Dataset, validation_rows: Dataset, run_folder: Path, archive: Path
) -> None:
    """Train, or go on from the newest whole checkpoint, and write `archive`."""
    seed_everything(config.seed, verbose=False)
    settings = config.task.train
    trainer = Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        max_epochs=settings.epochs,
        callbacks=[RunProgress(run_folder / "metrics.jsonl")],
        logger=False,  # exp_manager makes the logger and the checkpoints
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=settings.log_every,
    )
    size, budget, rank, world = (
        settings.batch_size * settings.accumulation,
        config.trainer.micro_batch_tokens,
        trainer.global_rank,
        trainer.world_size,
    )
    batches = Batches(rows, size, budget, config.seed, lambda: trainer.global_step, rank, world)
    validation = Batches(validation_rows, size, budget, None, rank=rank, world_size=world)
    steps = len(batches) * settings.epochs
    if settings.evaluate_every:
        trainer.check_val_every_n_epoch, trainer.val_check_interval = None, min(settings.evaluate_every, steps)
    checkpoints = run_folder / "checkpoints"
    resume_from = newest_checkpoint(checkpoints, len(batches))
    if resume_from:
        print(f"Going on from {resume_from.name} of {steps} steps")
    exp_manager(trainer, {
        "explicit_log_dir": str(run_folder / "tensorboard"),
        "name": config.task.name,
        "resume_if_exists": True,
        "resume_ignore_no_checkpoint": True,
        "resume_from_checkpoint": str(resume_from) if resume_from else None,
        "log_step_timing": False,
        "log_tflops_per_sec_per_gpu": False,
        "checkpoint_callback_params": {
            "dirpath": str(checkpoints),
            "verbose": False,
            "filename": "{step:06d}",
            "monitor": "step",
            "mode": "max",
            "save_top_k": 3,
            "save_last": False,
            "every_n_epochs": None,
            "every_n_train_steps": max(1, steps // CHECKPOINTS_PER_RUN),
            "save_nemo_on_train_end": False,
        },
    })  # fmt: skip
    peft = plain(config.peft)
    quantization = peft.pop("quantization")
    peft.pop("optimizer")  # task.train.optimizer says it
    model = GemmaLoRA(
        OmegaConf.create({
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
        }),
        trainer,
    )  # fmt: skip
    try:
        trainer.fit(model, batches, validation, ckpt_path=trainer.ckpt_path)
    except SystemExit:  # Lightning's way out after Ctrl-C and SIGTERM
        raise UserError(
            f"stopped after step {trainer.global_step} of {steps}. The same command goes on from the last checkpoint"
        ) from None
    partial = archive.with_suffix(".partial.nemo")
    model.save_to(str(partial))
    partial.rename(archive)


def newest_checkpoint(folder: Path, steps_per_epoch: int) -> Path | None:
    """The last one written whole (NeMo marks a checkpoint while it is being written); later ones are removed.

    Those of an epoch's last two steps are passed over where there is another: Lightning leaves out the validation of
    an epoch that is resumed with no row, or with one prefetched step, to go.
    """
    whole = [path for path in sorted(folder.glob("*.ckpt")) if not NeMoModelCheckpoint.is_checkpoint_unfinished(path)]
    steps = {path: int(path.stem.partition("=")[2].partition("-")[0]) for path in whole}
    inside = [path for path in whole if 0 < steps[path] % steps_per_epoch < steps_per_epoch - 1]
    chosen = (inside or whole)[-1] if whole else None
    for path in whole:
        if chosen and path.name > chosen.name:
            path.unlink()
    return chosen
