"""The systems under measurement, each in a process of its own (benchmarks/worker.py).

    python -m benchmarks.systems NAME JOB.json       (started by benchmarks.train)

A process loads its model and runs its own, unmodified training loop; a `Gate` in the loop's callbacks holds it between
rounds, so that one system computes at a time. One JSON object per line:

    writes  {"ready": {package: version}}                          before its first step
    reads   "go"
    writes  {"seconds", "tokens", "learned": target tokens}        after a round; the next waits for "go"
    writes  {"adapter": FILE, "peak_gib"} or {"failed": REASON}    at the end

To add a peer, write its function and its line in SYSTEMS.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """The job of every system.

    Attributes:
        base_folder: a Hugging Face folder.
        dtype: of the frozen weights, for systems that choose it by the machine ("bfloat16" or "float32").
        lora: peft.LoraConfig keys.
        initial: safetensors of the initial adapter, with peft's names.
        samples: JSON file with `[{"input_ids", "target_ranges"}, …]` (benchmarks/samples.py), in the order of training.
        steps: optimizer steps of each round; the first is the warm-up.
        batch: samples of an optimizer step.
        micro_batch: samples of a peer's micro-batch.
        micro_batch_tokens: tokens of this project's micro-batch.
        pack_tokens: tokens of a peer's packed sequence.
        prompt: core.prompt.Prompt keys.
        recipe: folder with NeMo AutoModel's recipe for this job, and for what it writes.
        adapter: file to write.
    """

    base_folder: str
    dtype: str
    lora: dict[str, Any]
    initial: str
    samples: str
    steps: list[int]
    batch: int
    micro_batch: int
    micro_batch_tokens: int
    pack_tokens: int
    learning_rate: float
    weight_decay: float
    clip: float
    seed: int
    prompt: dict[str, Any]
    recipe: str
    adapter: str

    def read_samples(self) -> list[dict[str, Any]]:
        return json.loads(Path(self.samples).read_text())


class Gate:
    """Holds a training loop before its first step and after each round, and counts the tokens that the model is
    given."""

    def __init__(self, steps: list[int], write: Callable[[dict[str, Any]], None]) -> None:
        self.steps, self.write = list(steps), write
        self.tokens: Tensor | int = 0
        self.targets: Tensor | int = 0

    def begin(self) -> None:
        names = (
            "torch",
            "transformers",
            "peft",
            "accelerate",
            "trl",
            "unsloth",
            "lightning",
            "nemo-toolkit",
            "nemo-automodel",
        )
        self.write({"ready": {name: found for name in names if (found := _version(name))}})
        self._wait()

    def count(self, tokens: Tensor | int, targets: Tensor | int) -> None:
        """Add tokens without padding, and target tokens; tensors are read only at the end of the round."""
        self.tokens, self.targets = self.tokens + tokens, self.targets + targets

    def step_done(self) -> None:
        self.left -= 1
        if self.left:
            return
        _finish_device_work()
        seconds = time.perf_counter() - self.began
        self.write({"seconds": seconds, "tokens": int(self.tokens), "learned": int(self.targets)})
        self.tokens = self.targets = 0
        if self.steps:
            self._wait()

    def _wait(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the systems share a GPU; while it waits, each keeps only its weights
        if sys.stdin.readline() != "go\n":
            os._exit(1)  # the benchmark was stopped
        self.left = self.steps.pop(0)
        self.began = time.perf_counter()


# --- this project ---------------------------------------------------------------------------------------------------
def ours(job: Job, gate: Gate) -> dict[str, Tensor]:
    """GemmaLoRA in Lightning's loop, as in training/fit.py, without checkpoints and logs."""
    from core.machine import quiet_libraries

    quiet_libraries()
    from lightning.pytorch import Callback, Trainer
    from safetensors.torch import load_file

    from benchmarks.samples import as_dataset
    from training.batches import Batches
    from training.gemma_lora import GemmaLoRA, model_settings, nemo_config

    class LightningHold(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            gate.begin()

        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            gate.count(sum(part.tokens for part in batch.micro_batches), batch.target_tokens)
            gate.step_done()

    trainer = Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=[LightningHold()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = GemmaLoRA(
        nemo_config(
            {
                **model_settings(Path(job.base_folder), {"name": "", **job.lora}, job.prompt, job.seed),
                "dtype": job.dtype,
                "clip": job.clip,
                "optim": {
                    "name": "adamw",
                    "lr": job.learning_rate,
                    "weight_decay": job.weight_decay,
                    "betas": [0.9, 0.999],
                    # Constant, as for the peers: cosine schedules differ by a step between libraries.
                    "sched": {
                        "name": "CosineAnnealing",
                        "max_steps": sum(job.steps) + 1,
                        "warmup_steps": 0,
                        "min_lr": job.learning_rate,
                    },
                },
            }
        ),
        trainer,
    )
    model.load_state_dict(load_file(job.initial))
    trainer.fit(model, Batches(as_dataset(job.read_samples()), job.batch, job.micro_batch_tokens, seed=None))
    return model.state_dict()


# --- peers on Hugging Face's Trainer --------------------------------------------------------------------------------
def hugging_face(job: Job, gate: Gate, weights: torch.dtype, autocast: bool) -> dict[str, Tensor]:
    """Trainer and peft as in their documentation: samples padded to the longest of a micro-batch, full logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = _adapted(AutoModelForCausalLM.from_pretrained(job.base_folder, dtype=weights), job)
    arguments = TrainingArguments(
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.batch // job.micro_batch,
        train_sampling_strategy="sequential",  # the same samples in the same step as ours
        bf16=autocast,
        remove_unused_columns=False,
        **_arguments(job),
    )
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(job.base_folder))
    return _train(Trainer(model, arguments, collator, _labelled(job), callbacks=[_hold(gate)]), gate)


def trl_packing(job: Job, gate: Gate) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    return _sft(_adapted(AutoModelForCausalLM.from_pretrained(job.base_folder, dtype=torch.bfloat16), job), job, gate)


def unsloth(job: Job, gate: Gate) -> dict[str, Tensor]:
    from unsloth import FastLanguageModel  # before trl, which it patches

    model, _ = FastLanguageModel.from_pretrained(
        job.base_folder, max_seq_length=job.pack_tokens, load_in_4bit=False, dtype=torch.bfloat16
    )
    lora = {key: job.lora[key] for key in ("r", "lora_alpha", "lora_dropout", "bias", "target_modules")}
    model = FastLanguageModel.get_peft_model(model, **lora, use_gradient_checkpointing=False, random_state=job.seed)
    return _sft(_begin_with(model, job), job, gate)


def _sft(model: Any, job: Job, gate: Gate) -> dict[str, Tensor]:
    """TRL's SFTTrainer with packing, which distributes samples anew, so that a step has other samples than ours."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = _labelled(job)
    per_step = sum(map(len, rows["input_ids"])) / sum(job.steps)
    config = SFTConfig(
        packing=True,
        max_length=job.pack_tokens,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, round(per_step / job.pack_tokens)),
        gradient_checkpointing=False,
        bf16=True,
        **_arguments(job),
    )
    tokenizer = AutoTokenizer.from_pretrained(job.base_folder)
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[_hold(gate)])
    # Packing decides the number of steps; warm-up and rounds get the same shares of them as ours.
    steps = -(-len(trainer.train_dataset) // config.gradient_accumulation_steps)
    warmup = min(job.steps[0], steps // 2)
    rounds = len(job.steps) - 1
    if steps - warmup < rounds:
        raise ValueError(f"only {steps} packed steps for {rounds} rounds: use more rows")
    gate.steps = [warmup, *[(steps - warmup) // rounds] * rounds]
    gate.steps[-1] += (steps - warmup) % rounds
    return _train(trainer, gate)


def _adapted(model: Any, job: Job) -> Any:
    from peft import LoraConfig, get_peft_model

    return _begin_with(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **job.lora)), job)


def _begin_with(model: Any, job: Job) -> Any:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    missing = set_peft_model_state_dict(model, load_file(job.initial)).unexpected_keys
    if missing:
        raise ValueError(f"the initial adapter does not fit: {missing[:2]}")
    return model


def _labelled(job: Job) -> Any:
    """Samples as a Trainer takes them, with the same target tokens as ours: the prompt is masked in the labels."""
    from datasets import Dataset

    rows = job.read_samples()
    return Dataset.from_dict(
        {
            "input_ids": [row["input_ids"] for row in rows],
            "labels": [_labels(row) for row in rows],
        }
    )


def _labels(row: dict[str, Any]) -> list[int]:
    labels = [-100] * len(row["input_ids"])
    for first, end in row["target_ranges"]:
        labels[first:end] = row["input_ids"][first:end]
    return labels


def _arguments(job: Job) -> dict[str, Any]:
    return {
        "output_dir": str(Path(job.adapter).parent),
        "num_train_epochs": 1,
        "seed": job.seed,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": job.weight_decay,
        "max_grad_norm": job.clip,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _hold(gate: Gate) -> Any:
    from transformers import TrainerCallback

    class TrainerHold(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.step_done()

    return TrainerHold()


def _train(trainer: Any, gate: Gate) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    def look(module: Any, _: Any, given: dict[str, Tensor]) -> None:
        mask, ids = given.get("attention_mask"), given["input_ids"]
        gate.count(ids.numel() if mask is None else mask.sum(), (given["labels"][..., 1:] != -100).sum())

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    return get_peft_model_state_dict(trainer.model)


# --- NVIDIA's recipe ------------------------------------------------------------------------------------------------
def automodel(job: Job, gate: Gate) -> dict[str, Tensor]:
    """NeMo AutoModel's recipe, as ENGINE=automodel runs it, on one process."""
    from safetensors.torch import load_file
    from torch.distributed.elastic.utils.distributed import get_free_port

    from training.automodel_worker import load_recipe

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    recipe = load_recipe(f"{job.recipe}/recipe.yaml")
    initial, (model,) = load_file(job.initial), recipe.model_parts
    adapter = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    if initial.keys() != {f"base_model.model.{name}" for name in adapter}:
        raise ValueError("the initial adapter does not fit")
    with torch.no_grad():
        for name, parameter in adapter.items():
            # A sharded parameter of one process is whole.
            getattr(parameter, "_local_tensor", parameter).copy_(initial[f"base_model.model.{name}"])

    step = recipe._run_train_optim_step

    def held_step(batches: list[dict[str, Tensor]], *arguments: Any) -> Any:
        for batch in batches:
            # Here a sample's last token is only a label; the other systems give it to the model too.
            tokens = batch["attention_mask"].sum() + len(batch["labels"])
            gate.count(tokens, (batch["labels"] != -100).sum())
        log = step(batches, *arguments)
        gate.step_done()
        return log

    recipe._run_train_optim_step = held_step
    gate.begin()
    recipe.run_train_validation_loop()
    return load_file(f"{job.recipe}/checkpoints/LATEST/model/adapter_model.safetensors")


# --- all of them ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class System:
    """
    Attributes:
        train: trains on a job's samples, held by the gate, and returns the adapter; None: not run by this benchmark.
        environment: folder of the virtual environment that has `package`.
        package: what must be importable there.
        needs_cuda: whether it runs on NVIDIA GPUs only.
        reason: why it is not run.
    """

    train: Callable[[Job, Gate], dict[str, Tensor]] | None
    environment: str = ".venv"
    package: str = "peft"
    needs_cuda: bool = False
    reason: str = ""


SYSTEMS = {
    "ours": System(ours, package="nemo"),
    "hf-fp32": System(lambda job, gate: hugging_face(job, gate, torch.float32, autocast=False)),
    "hf-bf16-autocast": System(lambda job, gate: hugging_face(job, gate, torch.float32, autocast=True)),
    "hf-bf16-weights": System(lambda job, gate: hugging_face(job, gate, torch.bfloat16, autocast=False)),
    "trl-packing": System(trl_packing, ".venv-bench", "trl"),
    "unsloth": System(unsloth, ".venv-bench", "unsloth", needs_cuda=True),
    "automodel": System(automodel, ".venv-automodel", "nemo_automodel"),
    "litgpt": System(None, reason="0.5.13 has no Gemma 3 270M, and takes no huggingface-hub that transformers 5 takes"),
}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(name: str, job_file: str) -> None:
    # Libraries may print to stdout, which is the protocol's.
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def write(message: dict[str, Any]) -> None:
        protocol.write(json.dumps(message) + "\n")

    # If memory runs out, this process should be killed, so that the benchmark continues without it.
    if (score := Path("/proc/self/oom_score_adj")).exists():
        score.write_text("1000")
    job = Job(**json.loads(Path(job_file).read_text()))
    train = SYSTEMS[name].train
    assert train is not None
    try:
        torch.manual_seed(job.seed)
        adapter = train(job, Gate(job.steps, write))
    except (torch.cuda.OutOfMemoryError, MemoryError):
        write({"failed": "out of memory"})
        raise
    except Exception as error:
        write({"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"})
        raise
    from safetensors.torch import save_file

    save_file({key: value.float().cpu().contiguous() for key, value in adapter.items()}, job.adapter)
    write({"adapter": job.adapter, "peak_gib": _peak_memory_gib()})


def _peak_memory_gib() -> float:
    """As `training.progress.peak_memory_gib`, which a peer's environment cannot import."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    held = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return int(held) / 2**20


if __name__ == "__main__":
    main(*sys.argv[1:])
