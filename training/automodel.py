"""The other training engine: NVIDIA's own recipe, NeMo AutoModel, on the same samples with the same settings.

    make train TASK=slang ENGINE=automodel          (python -m commands.train task=slang engine=automodel)

It writes the recipe and the tokenized samples into the run folder, has torchrun run them in `.venv-automodel`
(`training/automodel_worker.py`), shows what the recipe logs, and saves its adapter as the run's `.nemo`. So report,
converters and serving treat both engines' runs alike, and the two can be compared.

AutoModel differs from `training/fit.py` in this: adapters have the base's dtype (bfloat16, not float32), samples are
not grouped by length, the loss computes the whole 262,144-wide logits, and the learning rate is logged after a step.
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

from core.artifacts import MetricsLine
from core.configuration import plain
from core.errors import UserError
from core.files import write_lines, write_whole, writing
from core.schema import Config

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-automodel"
CHECKPOINTS_PER_RUN = 20
LORA_KEYS = {"name", "r", "lora_alpha", "lora_dropout", "bias", "target_modules", "optimizer"}
# Settings that the recipe cannot change, with the values that it has for them.
FIXED_SETTINGS = {
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


def check(config: Config) -> None:
    """Refuse what the recipe cannot do, before anything is loaded.

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
        f"task.train.{key}={getattr(config.task.train, key)}"
        for key, value in FIXED_SETTINGS.items()
        if getattr(config.task.train, key) != value
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


def package_versions() -> dict[str, str]:
    """Versions of the packages of `.venv-automodel` that decide the result, for environment.json."""
    names = {"nemo-automodel", "torch", "transformers", "triton"}
    (folder,) = ENVIRONMENT.glob("lib/python*/site-packages")
    found = {package.name: package.version for package in distributions(path=[str(folder)]) if package.name in names}
    return {f"automodel engine: {name}": found[name] for name in sorted(found)}


def fit(
    config: Config, base_folder: Path, samples: Any, validation_samples: Any, run_folder: Path, archive: Path
) -> None:
    """Train with the recipe, or resume from its newest checkpoint, and write `archive`; as `training.fit.fit`.

    Raises:
        UserError: the recipe failed; the text has the end of its log and the log's path.
    """
    folder = (run_folder / "automodel").resolve()
    folder.mkdir(exist_ok=True)
    write_samples(samples, folder / "training.jsonl")
    write_samples(validation_samples, folder / "validation.jsonl")
    recipe = write_recipe(config, base_folder, folder, list(samples["length"]))
    if (folder / "checkpoints" / "LATEST").exists():
        print("Resuming from the recipe's last checkpoint")
    steps = recipe["lr_scheduler"]["lr_decay_steps"]
    started = last_shown = time.monotonic()
    shown_step = 0
    written: Lines = []

    def show(lines: Lines) -> None:
        nonlocal last_shown, shown_step, written
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
        if now.step > shown_step and (time.monotonic() - last_shown > 5 or now.step == steps):
            last_shown, shown_step = time.monotonic(), now.step
            print(
                f"step {now.step}/{steps}  loss {now.train_loss:.3f}  {now.tokens_per_second:,.0f} tokens/s"
                f"  {last_shown - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    lines = run_recipe(recipe, folder, config.trainer.devices, show)
    write_tensorboard(lines, run_folder / "tensorboard")
    save(folder / "checkpoints" / "LATEST", config, base_folder, archive)


def write_samples(samples: Iterable[dict[str, Any]], file: Path) -> None:
    """Write samples (`training.batches.tokenize`) as `automodel_worker.TokenizedSamples` reads them.

    AutoModel could tokenize `{"input", "output"}` itself, but with its own templates; this way both engines train on
    exactly the same tokens.
    """
    write_lines(file, ({key: row[key] for key in ("input_ids", "target_ranges")} for row in samples))


def write_recipe(config: Config, base_folder: Path, folder: Path, lengths: list[int]) -> dict[str, Any]:
    """NVIDIA's gemma_3_270m_squad_peft recipe with this run's task, model and LoRA settings, for `yaml.safe_dump`.

    Args:
        folder: has `training.jsonl` and `validation.jsonl`; checkpoints and logs are written there.
        lengths: tokens of each training sample.
    """
    from training.gemma_lora import weights_dtype

    settings, lora, on_gpu = config.task.train, plain(config.peft), config.trainer.accelerator == "gpu"
    per_epoch = math.ceil(len(lengths) / settings.batch_size)
    steps = per_epoch * settings.epochs
    warmup = min(math.ceil(settings.warmup_ratio * steps), steps - 1)
    loader = {"_target_": "torchdata.stateful_dataloader.StatefulDataLoader", "collate_fn": COLLATE}
    dataset = {"_target_": "training.automodel_worker.TokenizedSamples"}
    return {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": config.seed,
        "step_scheduler": {
            "global_batch_size": settings.batch_size,
            "local_batch_size": local_batch_size(config, max(lengths)),
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
        "dataset": {**dataset, "file": str(folder / "training.jsonl")},
        "dataloader": {**loader, "shuffle": True},
        "validation_dataset": {**dataset, "file": str(folder / "validation.jsonl")},
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


def local_batch_size(config: Config, max_length: int) -> int:
    """Samples of a micro-batch: the largest divisor of the batch that fits a quarter of `trainer.micro_batch_tokens`.

    A quarter, since the recipe holds float32 logits over the whole vocabulary (1 MB a token), which our engine avoids.
    """
    share = config.task.train.batch_size // config.trainer.devices
    fitting = max(1, config.trainer.micro_batch_tokens // 4 // max_length)
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= fitting)


def run_recipe(
    recipe: dict[str, Any], folder: Path, devices: int, show: Callable[[Lines], None] = lambda lines: None
) -> Lines:
    """Run `recipe` on `devices` processes; `show` is called with its log, as `read_log` returns it, twice a second.

    Its processes never outlive this one: a later run may resume from the checkpoints.

    Returns:
        Its whole log.

    Raises:
        UserError: it failed.
    """
    file, log = folder / "recipe.yaml", folder / "recipe.log"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    print(f"Training with NeMo AutoModel, recipe {file}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(ENVIRONMENT / "bin/python"), "-m", "training.automodel_worker", str(file), str(devices)]
    with log.open("w") as output:
        # A session of its own, so that Ctrl-C reaches only this process, which then asks the recipe to stop.
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                show(read_log(folder / "checkpoints"))
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun passes it on, and the recipe writes a last checkpoint
                process.wait()
    if process.returncode:
        raise UserError(f"NeMo AutoModel's recipe failed. The end of its log:\n{log_tail(log)}\nThe whole log: {log}")
    lines = read_log(folder / "checkpoints")
    show(lines)
    return lines


def read_log(folder: Path) -> Lines:
    """The recipe's logs of steps and validations as lines of `metrics.jsonl`, ordered by step.

    Steps count from 1, epochs from 0. Of a step that a resumed run took twice, the later line is kept. `memory_gib` is
    the peak of one process: GPU memory, or main memory without a GPU.
    """
    lines: dict[tuple[int, str], MetricsLine] = {}
    for name, kind in (("training", "train_loss"), ("validation", "val_loss")):
        file = folder / f"{name}.jsonl"
        for text in file.read_text().splitlines() if file.exists() else []:
            try:
                logged = json.loads(text)
            except ValueError:  # a line that is still being written
                continue
            line = MetricsLine(step=logged["step"] + 1, epoch=logged["epoch"])
            if kind == "train_loss":
                line.train_loss = logged["loss"]
                line.learning_rate = logged["lr"]
                line.grad_norm = logged["grad_norm"]
                line.tokens_per_second = round(logged["tps"], 1)
                line.seconds = round(logged["num_tokens_per_step"] / logged["tps"], 4)
                line.memory_gib = round(logged["mem"], 2)
            else:
                line.val_loss = logged["val_loss"]
            lines[line.step, kind] = line
    return [lines[key] for key in sorted(lines)]


def save(checkpoint: Path, config: Config, base_folder: Path, archive: Path) -> None:
    """Save the recipe's adapter, which has peft's tensor names, as this project's `.nemo` in float32."""
    from safetensors.torch import load_file

    from training.gemma_lora import GemmaLoRA, model_settings, nemo_config

    adapter = load_file(checkpoint / "model" / "adapter_model.safetensors")
    settings = model_settings(base_folder, plain(config.peft), plain(config.task.prompt), config.seed)
    model = GemmaLoRA(nemo_config(settings))
    model.load_state_dict({name: tensor.float() for name, tensor in adapter.items()})
    with writing(archive) as partial:
        model.save_to(str(partial))


def write_tensorboard(lines: Lines, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for line in lines:
            for name in line.model_fields_set - {"format", "step", "epoch"}:
                writer.add_scalar(name, getattr(line, name), line.step)


def log_tail(log: Path) -> str:
    """The end of a worker's traceback, where there is one: torchrun says much after it."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    of_workers = [line for line in lines if line.startswith("[rank")]
    before_torchrun = list(takewhile(lambda line: "distributed/elastic" not in line, lines))
    return "\n".join((of_workers or before_torchrun or lines)[-5:])
