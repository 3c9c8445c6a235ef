"""One run's training: a Lightning trainer with NeMo's exp_manager around `GemmaLoRA`, resumed where it stopped."""

import math
from pathlib import Path

from datasets import Dataset
from lightning.pytorch import Trainer, seed_everything
from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer

from data_prep.prompt import Prompt
from nemo_configs.command_line import UserError, plain
from training.base_model import describe
from training.batches import Batches, tokenize
from training.distribute import AdapterParallel
from training.gemma_lora import GemmaLoRA, weights_dtype
from training.progress import RunProgress

CHECKPOINTS_PER_RUN = 20


def fit_folders(config: DictConfig, run_folder: Path, base_folder: Path, data_folder: Path) -> None:
    """`fit` for one of several processes, which have nothing in memory yet."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    prompt = Prompt(**plain(config.task.prompt))
    training, validation = (
        tokenize(data_folder / f"{name}.jsonl", tokenizer, prompt, config.task.train.max_length,
                 cache=data_folder / ".tokens")[0]
        for name in ("training", "validation")
    )  # fmt: skip
    fit(config, base_folder, training, validation, run_folder, run_folder / f"{config.task.name}.nemo")


def fit(
    config: DictConfig, base_folder: Path, rows: Dataset, validation_rows: Dataset, run_folder: Path, archive: Path
) -> None:
    """Train, or go on from the newest whole checkpoint, and write `archive`."""
    seed_everything(config.seed, verbose=False)
    settings = config.task.train
    processes = config.trainer.devices * config.trainer.num_nodes
    kind = "ddp" if config.trainer.strategy == "auto" else config.trainer.strategy
    strategy = AdapterParallel(kind) if processes > 1 else "auto"
    trainer = Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy,
        inference_mode=processes == 1,  # weights gathered in inference mode could not be trained with again
        max_epochs=settings.epochs,
        callbacks=[RunProgress(run_folder / "metrics.jsonl")],
        logger=False,  # exp_manager makes the logger and the checkpoints
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    size, budget = settings.batch_size, config.trainer.micro_batch_tokens
    rank, world = strategy.share if isinstance(strategy, AdapterParallel) else (0, 1)
    batches = Batches(rows, size, budget, config.seed, lambda: trainer.global_step, rank, world)
    validation = Batches(validation_rows, size, budget, None, rank=rank, world_size=world)
    steps = len(batches) * settings.epochs
    checkpoints = run_folder / "checkpoints"
    # One process chooses, as it removes what comes after.
    resume_from = newest_checkpoint(checkpoints, len(batches)) if trainer.is_global_zero else None
    resume_from = trainer.strategy.broadcast(resume_from)
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
    model = GemmaLoRA(
        OmegaConf.create({
            "base_folder": str(base_folder),
            "base": describe(base_folder),
            "dtype": str(weights_dtype()).removeprefix("torch."),
            "peft": config.peft,
            "prompt": config.task.prompt,
            "seed": config.seed,
            "clip": settings.clip,
            "optim": {
                "name": "adamw",
                "lr": settings.learning_rate,
                "weight_decay": settings.weight_decay,
                "betas": [0.9, 0.999],
                "sched": {
                    "name": "CosineAnnealing",
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
    if trainer.is_global_zero:
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
