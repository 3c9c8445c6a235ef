"""The other engine: NVIDIA's own recipe, NeMo AutoModel, on the same rows with the same settings.

    make train TASK=slang ENGINE=automodel          (python -m commands.train task=slang engine=automodel)

It writes the recipe and the tokenized rows into the run folder, has torchrun run them in `.venv-automodel` (see
`training/automodel_worker.py`), shows what the recipe logs, and brings its adapter back as the run's `.nemo`. So
report, converters and serving treat both engines' runs alike, and the two can be compared.

What AutoModel decides otherwise than `training/fit.py`: adapters have the base's dtype (bfloat16, not float32), rows
are not grouped by length, the loss needs the whole 262,144-wide logits, and the learning rate is logged after a step.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import distributions
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from core.artifacts import MetricsLine
from core.configuration import plain
from core.errors import UserError
from core.files import write_lines, write_whole, writing

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-automodel"
CHECKPOINTS_PER_RUN = 20
LORA_KEYS = {"name", "r", "lora_alpha", "lora_dropout", "bias", "target_modules", "optimizer"}
# What the recipe is not told, with the values that it has for it.
TRAIN_KEYS = {
    "accumulation": 1,
    "optimizer": "adamw",
    "schedule": "CosineAnnealing",
    "gradient_checkpointing": False,
    "evaluate_every": None,
    "evaluate_every_tokens": None,
    "early_stopping": None,
}
AUTOMODEL = "nemo_automodel"
COLLATE = f"{AUTOMODEL}.components.datasets.utils.default_collater"

Lines = list[MetricsLine]


def check(config: DictConfig) -> None:
    """
    Raises:
        UserError: the environment is missing, or the recipe cannot do what the configuration asks for.
    """
    if config.trainer.num_nodes != 1:
        raise UserError("engine=automodel runs on one machine here: set trainer.num_nodes=1")
    lora = plain(config.peft)
    unknown = sorted(key for key, value in lora.items() if key not in LORA_KEYS and value)
    if lora["bias"] != "none":
        unknown.append("bias")
    if not isinstance(lora["target_modules"], list):
        unknown.append("target_modules, unless it is a list of names")
    if unknown:
        raise UserError(
            f"engine=automodel cannot do what {config.peft.name} asks for: peft.{', peft.'.join(unknown)}. "
            f"engine=lightning can"
        )
    wanted = [
        f"task.train.{key}={config.task.train[key]}"
        for key, value in TRAIN_KEYS.items()
        if config.task.train[key] != value
    ]
    if config.trainer.strategy != "auto":
        wanted.append(f"trainer.strategy={config.trainer.strategy}")
    if wanted:
        raise UserError(f"engine=automodel cannot do {', '.join(wanted)}. engine=lightning can")
    if config.task.train.batch_size % config.trainer.devices:
        raise UserError(
            f"task.train.batch_size={config.task.train.batch_size} cannot be dealt out evenly to "
            f"trainer.devices={config.trainer.devices}"
        )
    if not (ENVIRONMENT / "automodel.stamp").exists():
        raise UserError(
            f"engine=automodel runs in an environment of its own, and {ENVIRONMENT} is not there. "
            f"Install it (about 2.5 GB): make automodel-env"
        )


def versions() -> dict[str, str]:
    """The packages of `.venv-automodel` that decide the result, for environment.json."""
    names = {"nemo-automodel", "torch", "transformers", "triton"}
    (folder,) = ENVIRONMENT.glob("lib/python*/site-packages")
    found = {package.name: package.version for package in distributions(path=[str(folder)]) if package.name in names}
    return {f"automodel engine: {name}": found[name] for name in sorted(found)}


def fit(
    config: DictConfig, base_folder: Path, rows: Any, validation_rows: Any, run_folder: Path, archive: Path
) -> None:
    """Train by the recipe, or go on from its newest checkpoint, and write `archive`. As `training.fit.fit`.

    Raises:
        UserError: the recipe failed; the text has its last words and where its whole log is.
    """
    folder = (run_folder / "automodel").resolve()
    folder.mkdir(exist_ok=True)
    write_rows(rows, folder / "training.jsonl")
    write_rows(validation_rows, folder / "validation.jsonl")
    recipe = write_recipe(config, base_folder, folder, list(rows["length"]))
    if (folder / "checkpoints" / "LATEST").exists():
        print("Going on from the recipe's last checkpoint")
    steps = recipe["lr_scheduler"]["lr_decay_steps"]
    began = last_said = time.monotonic()
    said = 0
    written: Lines = []

    def show(lines: Lines) -> None:
        nonlocal last_said, said, written
        if lines == written:
            return
        written = lines
        write_whole(run_folder / "metrics.jsonl", "".join(line.to_line() for line in lines))
        trained = [line for line in lines if line.train_loss is not None]
        if not trained:
            return
        now = trained[-1]
        if not math.isfinite(now.train_loss or 0):
            rate = config.task.train.learning_rate
            raise UserError(
                f"the loss became {now.train_loss} at step {now.step}. Lower "
                f"task.train.learning_rate (now {rate}) and train again"
            )
        if now.step > said and (time.monotonic() - last_said > 5 or now.step == steps):
            last_said, said = time.monotonic(), now.step
            print(
                f"step {now.step}/{steps}  loss {now.train_loss:.3f}  {now.tokens_per_second:,.0f} tokens/s"
                f"  {last_said - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    lines = run_recipe(recipe, folder, config.trainer.devices, show)
    write_tensorboard(lines, run_folder / "tensorboard")
    save(folder / "checkpoints" / "LATEST", config, base_folder, archive)


def write_rows(rows: Iterable[dict[str, Any]], file: Path) -> None:
    """Our tokenized rows (`training.batches.tokenize`) as `automodel_worker.TokenizedRows` reads them.

    AutoModel could tokenize `{"input", "output"}` itself, but its templates are not our prompt; so both engines learn
    the very same tokens.
    """
    write_lines(file, ({key: row[key] for key in ("input_ids", "learned")} for row in rows))


def write_recipe(config: DictConfig, base_folder: Path, folder: Path, lengths: list[int]) -> dict[str, Any]:
    """The YAML of NVIDIA's gemma_3_270m_squad_peft recipe with this run's task, model and LoRA settings.

    Args:
        folder: holds `training.jsonl` and `validation.jsonl`; gets checkpoints and logs.
        lengths: tokens of each training row.
    """
    from training.gemma_lora import weights_dtype

    settings, lora, on_gpu = config.task.train, plain(config.peft), config.trainer.accelerator == "gpu"
    per_epoch = math.ceil(len(lengths) / settings.batch_size)
    steps = per_epoch * settings.epochs
    warmup = min(math.ceil(settings.warmup_ratio * steps), steps - 1)
    loader = {"_target_": "torchdata.stateful_dataloader.StatefulDataLoader", "collate_fn": COLLATE}
    rows = {"_target_": "training.automodel_worker.TokenizedRows"}
    return {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": config.seed,
        "step_scheduler": {
            "global_batch_size": settings.batch_size,
            "local_batch_size": rows_at_once(config, max(lengths)),
            "num_epochs": settings.epochs,
            "val_every_steps": per_epoch,
            "ckpt_every_steps": max(1, steps // CHECKPOINTS_PER_RUN),
            "save_checkpoint_every_epoch": False,
            "validate_on_checkpoint": False,
        },
        "dist_env": {"backend": "nccl" if on_gpu else "gloo", "timeout_minutes": 10},
        "model": {
            "_target_": f"{AUTOMODEL}.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(base_folder.resolve()),
            "torch_dtype": str(weights_dtype()).removeprefix("torch."),
            "attn_implementation": "eager",
        },
        "peft": {
            "_target_": f"{AUTOMODEL}.components._peft.lora.PeftConfig",
            "target_modules": [f"*.{name}" for name in lora["target_modules"]],
            "dim": lora["r"],
            "alpha": lora["lora_alpha"],
            "dropout": lora["lora_dropout"],
            "dropout_position": "pre",  # as peft has it
            "lora_A_init": "uniform",  # the same distribution as peft's; the recipe's own default is xavier
            "use_triton": on_gpu,
        },
        "distributed": {"strategy": "fsdp2", "dp_size": None, "tp_size": 1, "cp_size": 1},
        "loss_fn": {"_target_": f"{AUTOMODEL}.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {**rows, "file": str(folder / "training.jsonl")},
        "dataloader": {**loader, "shuffle": True},
        "validation_dataset": {**rows, "file": str(folder / "validation.jsonl")},
        "validation_dataloader": dict(loader),
        "packed_sequence": {"packed_sequence_size": 0},
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "lr": settings.learning_rate,
            "betas": [0.9, 0.999],
            "weight_decay": settings.weight_decay,
        },
        "lr_scheduler": {
            "lr_decay_style": "cosine",
            "lr_warmup_steps": warmup,
            "lr_decay_steps": steps,
            "init_lr": settings.learning_rate / (warmup + 1),  # NeMo's warm-up: the first step moves already
            "min_lr": 0.0,
        },
        "clip_grad_norm": {"max_norm": settings.clip},
        "checkpoint": {
            "enabled": True,
            "checkpoint_dir": str(folder / "checkpoints"),
            "model_save_format": "safetensors",
            "save_consolidated": False,
            "max_recent_checkpoints": 2,
        },
    }


def rows_at_once(config: DictConfig, longest: int) -> int:
    """Rows of a micro-batch: as many as divide the batch and fit a quarter of `trainer.micro_batch_tokens`.

    A quarter, since the recipe holds float32 logits over the whole vocabulary (1 MB a token), which our engine avoids.
    """
    share = config.task.train.batch_size // config.trainer.devices
    fitting = max(1, config.trainer.micro_batch_tokens // 4 // longest)
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= fitting)


def run_recipe(
    recipe: dict[str, Any], folder: Path, devices: int, show: Callable[[Lines], None] = lambda lines: None
) -> Lines:
    """Run `recipe` on `devices` processes; `show` gets what it has logged, twice a second.

    A process of this run never outlives this one: a later run may go on from the checkpoints.

    Returns:
        What it logged, as `read_log` says.

    Raises:
        UserError: it failed.
    """
    file, log = folder / "recipe.yaml", folder / "recipe.log"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    print(f"NeMo AutoModel trains, by {file}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    words = [str(ENVIRONMENT / "bin/python"), "-m", "training.automodel_worker", str(file), str(devices)]
    with log.open("w") as output:
        # A session of its own, so that Ctrl-C reaches only this process, which then asks the recipe to stop.
        process = subprocess.Popen(words, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                show(read_log(folder / "checkpoints"))
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun passes it on, and the recipe writes a last checkpoint
                process.wait()
    if process.returncode:
        raise UserError(f"NeMo AutoModel's recipe failed. Its last words:\n{last_words(log)}\nIts whole log: {log}")
    lines = read_log(folder / "checkpoints")
    show(lines)
    return lines


def read_log(folder: Path) -> Lines:
    """The recipe's logs as lines of `metrics.jsonl`: those of steps and of validations, ordered by step.

    Steps count from 1, epochs from 0. Of a step that a resumed run took twice, the later counts. `memory_gib` is the
    most that one process has held: GPU memory, or main memory where there is no GPU.
    """
    lines: dict[tuple[int, str], MetricsLine] = {}
    for name, kind in (("training", "train_loss"), ("validation", "val_loss")):
        file = folder / f"{name}.jsonl"
        for text in file.read_text().splitlines() if file.exists() else []:
            try:
                said = json.loads(text)
            except ValueError:  # a line not yet whole
                continue
            line = MetricsLine(step=said["step"] + 1, epoch=said["epoch"])
            if kind == "train_loss":
                line.train_loss = said["loss"]
                line.learning_rate = said["lr"]
                line.grad_norm = said["grad_norm"]
                line.tokens_per_second = round(said["tps"], 1)
                line.seconds = round(said["num_tokens_per_step"] / said["tps"], 4)
                line.memory_gib = round(said["mem"], 2)
            else:
                line.val_loss = said["val_loss"]
            lines[line.step, kind] = line
    return [lines[key] for key in sorted(lines)]


def save(checkpoint: Path, config: DictConfig, base_folder: Path, archive: Path) -> None:
    """The recipe's adapter as this project's `.nemo`: same names as peft's, made float32."""
    from omegaconf import OmegaConf
    from safetensors.torch import load_file

    from core.base_model import describe
    from training.gemma_lora import GemmaLoRA, weights_dtype

    adapter = load_file(checkpoint / "model" / "adapter_model.safetensors")
    peft = {key: value for key, value in plain(config.peft).items() if key not in ("quantization", "optimizer")}
    model = GemmaLoRA(
        OmegaConf.create(
            {
                "base_folder": str(base_folder),
                "base": describe(base_folder),
                "dtype": str(weights_dtype()).removeprefix("torch."),
                "peft": peft,
                "prompt": config.task.prompt,
                "seed": config.seed,
            }
        )
    )
    model.load_state_dict({name: tensor.float() for name, tensor in adapter.items()})
    with writing(archive) as partial:
        model.save_to(str(partial))


def write_tensorboard(lines: Lines, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for line in lines:
            for name in line.model_fields_set - {"format", "step", "epoch"}:
                writer.add_scalar(name, getattr(line, name), line.step)


def last_words(log: Path) -> str:
    """The end of a worker's traceback, where there is one: torchrun says much after it."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    of_workers = [line for line in lines if line.startswith("[rank")]
    before_torchrun = list(takewhile(lambda line: "distributed/elastic" not in line, lines))
    return "\n".join((of_workers or before_torchrun or lines)[-5:])
