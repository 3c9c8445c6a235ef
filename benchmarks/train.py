"""Training speed of this project beside its peers: same base, same rows, one after another in turns.

    python -m benchmarks.train task.data.source=all_slangs.csv          (what `make bench SOURCE=…` calls)
    python -m benchmarks.train systems=ours,hf-fp32 rows=64 rounds=5 length=512
    python -m benchmarks.train task.data.source=reviews.csv text=review_text

Words of its own, beside those of the configuration:
    systems   comma-separated names of benchmarks/systems.py; default all
    rows      of a round; default about half a minute's work for the slowest
    rounds    counted ones; the medians are of them
    warmup    optimizer steps before them, not counted
    length    tokens of every row, cut from the table's rows; default the rows as they are
    text      the one column to learn, for a table that is no task
    random    an architecture of benchmarks/random_base.py, with random weights, in place of the base model

Every system starts from the same adapter; what it has learned from the same rows is measured on held-out rows by one
evaluator. Writes benchmarks/results/<machine>-<model>-<data>.json, and docs/benchmarks.md from all that lie there.
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from core.base_model import describe, ensure_base_model
from core.configuration import load_config, plain
from core.errors import UserError, run

RESULTS = Path("benchmarks/results")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Words:
    """The words of this command; `read` parses them."""

    systems: list[str]
    rows: int | None = None
    rounds: int = 3
    warmup: int = 2
    length: int | None = None
    text: str | None = None
    random: str | None = None

    @classmethod
    def read(cls, words: list[str]) -> tuple["Words", list[str]]:
        """
        Returns:
            The words, and those left for the configuration.

        Raises:
            UserError: an unknown system, or a number that is none.
        """
        from benchmarks.systems import SYSTEMS

        given, others = cls(list(SYSTEMS)), []
        for word in words:
            name, _, value = word.partition("=")
            if name == "systems":
                given.systems = list(dict.fromkeys(value.split(",")))
            elif name in ("text", "random"):
                setattr(given, name, value)
            elif name in ("rows", "rounds", "warmup", "length"):
                if not value.isdecimal() or int(value) < (2 if name == "length" else 1):
                    raise UserError(f"{word}: {name} is a whole number above {1 if name == 'length' else 0}")
                setattr(given, name, int(value))
            else:
                others.append(word)
        if unknown := [name for name in given.systems if name not in SYSTEMS]:
            raise UserError(f"unknown system {', '.join(unknown)}. Known: {', '.join(SYSTEMS)}")
        return given, others


def main(words: list[str]) -> None:
    own, others = Words.read(words)
    config = load_config(others)
    source = Path(config.task.data.source)
    config.data_dir = str(Path(config.data_dir).parent / f"bench-{source.stem}")
    if own.text:
        from benchmarks.rows import text_task

        config = text_task(config, own.text)

    from benchmarks import table

    base_folder = ensure_base_model(config.model).resolve()
    if own.random:
        from benchmarks.random_base import random_base

        base_folder = random_base(own.random, base_folder, Path(config.model.models_dir)).resolve()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        result = measure(own, config, base_folder, Path(scratch))
    result["command"] = shlex.join(["python", "-m", "benchmarks.train", *(_without_folder(word) for word in words)])
    result["data"]["source"] = source.name
    RESULTS.mkdir(parents=True, exist_ok=True)

    from core.files import write_json

    name = [result["machine"], result["model"], source.stem, *([str(own.length)] if own.length else [])]
    file = RESULTS / (re.sub(r"[^a-z0-9.]+", "-", "-".join(name).lower()).strip("-") + ".json")
    write_json(file, result)
    table.show(result)
    print(f"written: {file}, {table.write_docs(RESULTS)}")


def measure(own: Words, config: DictConfig, base_folder: Path, scratch: Path) -> dict[str, Any]:
    """Run the rounds and put together all that table.py shows."""
    from transformers import AutoConfig

    from benchmarks import ceiling
    from benchmarks.rows import as_dataset, read_rows
    from benchmarks.systems import Job
    from core.machine import describe_environment, quiet_libraries, short_processor_name
    from training.flops import flops_of

    quiet_libraries()
    from training.batches import Batches
    from training.gemma_lora import weights_dtype
    from training.memory import GIB, estimate, largest_micro_batch

    on_gpu, settings = config.trainer.accelerator == "gpu", config.task.train
    step_tokens, peer_tokens = (32_768, 8192) if on_gpu else (4096, 2048)
    # As many tokens a step at every length, as far as whole rows allow.
    batch = max(1, step_tokens // own.length) if own.length else settings.batch_size
    wanted = own.rows or batch * ((16 if on_gpu else 1) if own.length else (32 if on_gpu else 2))
    steps = [own.warmup, *[-(-wanted // batch)] * own.rounds]
    training, held_out = read_rows(config, base_folder, own.length, sum(steps) * batch)
    counted = training[steps[0] * batch :]
    lengths, learned = _count(counted)
    longest = max(len(row["input_ids"]) for row in training)
    micro = max(1, min(8, batch, peer_tokens // longest))  # peers hold a megabyte of logits for each token, or more
    while batch % micro:
        micro -= 1
    if config.peft.quantization:
        raise UserError("the benchmark compares LoRA on the whole base: peft=lora")
    lora = {key: value for key, value in plain(config.peft).items() if key not in ("name", "quantization", "optimizer")}

    (scratch / "rows.json").write_text(json.dumps(training))
    in_order = Batches(as_dataset(training), batch, config.trainer.micro_batch_tokens, seed=None)
    expected = estimate(config, base_folder, weights_dtype(), *largest_micro_batch(in_order))
    initial = scratch / "initial.safetensors"
    evaluator = Evaluator(base_folder, lora, held_out, config.trainer.micro_batch_tokens)
    before = evaluator.begin(config.seed, initial)
    recipe = write_recipe(config, base_folder, training, steps, batch, micro, scratch)
    jobs = {
        name: Job(
            base_folder=str(base_folder),
            dtype=str(weights_dtype()).removeprefix("torch."),
            lora=lora,
            initial=str(initial),
            rows=str(scratch / "rows.json"),
            steps=steps,
            batch=batch,
            micro_batch=micro,
            micro_batch_tokens=config.trainer.micro_batch_tokens,
            pack_tokens=max(longest, 4096 if on_gpu else 1024),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            seed=config.seed,
            prompt=plain(config.task.prompt),
            recipe=str(recipe),
            adapter=str(scratch / f"{name}.safetensors"),
        )
        for name in own.systems
    }
    print(
        f"{len(counted)} rows in {own.rounds} rounds, {sum(lengths):,} tokens, {learned:,} of them learned; "
        f"{batch} rows a step, {micro} at once for peers",
        flush=True,
    )
    gemma = AutoConfig.from_pretrained(base_folder)
    tokens_at_once = min(config.trainer.micro_batch_tokens, batch * sum(lengths) // len(lengths))
    shape = gemma, tokens_at_once, max(1, tokens_at_once * learned // sum(lengths))
    print("Measuring the ceiling, before the rounds and after them", flush=True)
    rates = ceiling.measure(*shape)
    systems = run_rounds(jobs, scratch)
    given = _count(training)
    for name, system in systems.items():  # a figure counts only for the very tokens that all were given
        seen = system.pop("seen", None)
        if seen and seen != {"tokens": sum(given[0]), "learned": given[1]}:
            systems[name] = {"not_run": f"its loop saw {seen}, not the {sum(given[0])} tokens and {given[1]} learned"}
    for name, system in systems.items():
        if "rounds" in system:
            system["held_out_loss"] = evaluator.loss(Path(jobs[name].adapter))
    rates = ceiling.higher(rates, ceiling.measure(*shape))
    flops = flops_of(gemma, lengths, learned, lora["r"], lora["target_modules"])
    environment = describe_environment()
    versions = {name: system.pop("versions") for name, system in systems.items() if "versions" in system}
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": environment.gpus[0] if environment.gpus else f"{short_processor_name()}, {environment.cores} cores",
        "environment": environment.model_dump(include={"commit", "python", "cpu", "cores", "memory_gib", "gpus"}),
        "versions": versions,
        "model": f"{own.random} (random weights)" if own.random else describe(base_folder)["name"],
        "data": {
            "length": own.length,
            "rows": len(counted),
            "tokens": sum(lengths),
            "learned": learned,
            "longest": longest,
            "held_out_rows": len(held_out),
        },
        "settings": {
            "lora": lora,
            "rows_per_step": batch,
            "peer_rows_at_once": micro,
            "steps": steps,
            "micro_batch_tokens": config.trainer.micro_batch_tokens,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "clip": settings.clip,
            "seed": config.seed,
        },
        "ceiling": rates,
        "flops": asdict(flops) | {"total": flops.total},
        "seconds_at_ceiling": {
            dtype: ceiling.seconds_at_ceiling(flops, rates[dtype]) for dtype in ("bfloat16", "float32")
        },
        "held_out_loss_before": before,
        "memory_expected_gib": expected.total / GIB,
        "systems": systems,
    }


def write_recipe(
    config: DictConfig,
    base_folder: Path,
    rows: list[dict[str, Any]],
    steps: list[int],
    batch: int,
    micro: int,
    scratch: Path,
) -> Path:
    """NeMo AutoModel's recipe as ENGINE=automodel writes it, for this job's steps. Its environment has no OmegaConf.

    Returns:
        The folder with `recipe.yaml` and its rows.
    """
    import yaml

    from training import automodel

    folder = scratch / "automodel"
    folder.mkdir()
    automodel.write_rows(rows, folder / "training.jsonl")
    recipe = automodel.write_recipe(config, base_folder, folder, [len(row["input_ids"]) for row in rows])
    recipe["step_scheduler"] |= {
        "global_batch_size": batch,
        "local_batch_size": micro,
        "num_epochs": 1,
        "val_every_steps": None,
        "ckpt_every_steps": sum(steps),
    }
    recipe["dataloader"]["shuffle"] = False
    recipe["lr_scheduler"] |= {"lr_decay_style": "constant", "lr_warmup_steps": 0}
    del recipe["validation_dataset"], recipe["validation_dataloader"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def run_rounds(jobs: dict[str, Any], scratch: Path) -> dict[str, dict[str, Any]]:
    """Start every system, then give each its round in turn; one computes at a time.

    Returns:
        Name → `{"rounds": [{"seconds", "tokens", "learned"}], "tokens_per_second", "seen", …}`, or
        `{"not_run": reason}`.
    """
    from benchmarks.systems import Job

    found: dict[str, dict[str, Any]] = {}
    running: dict[str, Worker] = {}
    try:
        for name, job in jobs.items():
            assert isinstance(job, Job)
            try:
                python = interpreter(name)
                print(f"  {name}: loading", flush=True)
                running[name] = worker = Worker(name, python, job, scratch)
                found[name] = {"versions": worker.hear()["ready"], "rounds": []}
            except NotRun as reason:
                _leave_out(name, reason, found, running)
        turns = len(next(iter(jobs.values())).steps)
        for turn in range(turns):
            for name, worker in list(running.items()):
                try:
                    heard = worker.round()
                    print(
                        f"  {name}: {'warm-up' if not turn else f'round {turn}'}: {heard['seconds']:.2f} s, "
                        f"{heard['tokens'] / heard['seconds']:,.0f} tokens/s",
                        flush=True,
                    )
                    found[name]["rounds"].append(heard)
                    if turn == turns - 1:
                        found[name] |= {"peak_gib": worker.hear()["peak_gib"]}
                except NotRun as reason:
                    _leave_out(name, reason, found, running)
    finally:
        for worker in running.values():
            worker.stop()
    for system in found.values():
        if "rounds" in system:
            system["seen"] = {kind: sum(one[kind] for one in system["rounds"]) for kind in ("tokens", "learned")}
            del system["rounds"][0]  # the warm-up
            for rate, kind in (("tokens_per_second", "tokens"), ("learned_per_second", "learned")):
                system[rate] = statistics.median(one[kind] / one["seconds"] for one in system["rounds"])
    return {name: found[name] for name in jobs}


class NotRun(Exception):
    """Why a system is not in the comparison."""


def interpreter(name: str) -> str:
    """The Python that has what the system `name` needs.

    Raises:
        NotRun: there is none, or no GPU for a system that needs one.
    """
    import torch

    from benchmarks.systems import SYSTEMS

    system = SYSTEMS[name]
    if system.train is None:
        raise NotRun(system.reason)
    if system.needs_cuda and not torch.cuda.is_available():
        raise NotRun("needs an NVIDIA GPU")
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{system.package}') is None)"
    for python in (sys.executable, str(ROOT / system.environment / "bin/python")):
        if Path(python).exists() and not subprocess.run([python, "-c", probe], check=False).returncode:
            return python
    raise NotRun(f"{system.package} is not installed (looked here and in {system.environment})")


class Worker:
    """One system's process, and the lines spoken with it; see benchmarks/systems.py."""

    def __init__(self, name: str, python: str, job: Any, scratch: Path) -> None:
        file = scratch / f"{name}.job.json"
        file.write_text(json.dumps(asdict(job)))
        # One device: Hugging Face's Trainer would use all of them in one process.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": visible}
        self.log = scratch / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.systems", name, str(file)],
                text=True,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def hear(self) -> dict[str, Any]:
        """The next message. Raises NotRun: the system has failed or was killed."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            said = [line for line in self.log.read_text().splitlines() if line.strip()]
            killed = "killed, most likely for want of memory" if code == -9 else f"ended with code {code}"
            raise NotRun(f"{killed}{': ' + said[-1][:200] if said and code != -9 else ''}")
        message: dict[str, Any] = json.loads(line)
        if "failed" in message:
            raise NotRun(message["failed"])
        return message

    def round(self) -> dict[str, Any]:
        assert self.process.stdin
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `hear` says what happened to it
        return self.hear()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def _leave_out(name: str, reason: NotRun, found: dict[str, dict[str, Any]], running: dict[str, Worker]) -> None:
    print(f"  {name}: not run: {reason}", flush=True)
    found[name] = {"not_run": str(reason)}
    if worker := running.pop(name, None):
        worker.stop()


class Evaluator:
    """Loss on held-out rows, by the same code for every adapter: plain transformers and peft under it."""

    def __init__(self, base_folder: Path, lora: dict[str, Any], rows: list[dict[str, Any]], budget: int) -> None:
        self.base_folder, self.lora, self.rows, self.budget = base_folder, lora, rows, budget

    def begin(self, seed: int, initial: Path) -> float:
        """Write the adapter that every system begins with; its loss, which is the base model's."""
        import torch
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        torch.manual_seed(seed)
        model = self._adapted()
        save_file({name: value.contiguous() for name, value in get_peft_model_state_dict(model).items()}, initial)
        return self._loss(model)

    def loss(self, adapter: Path) -> float:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        model = self._adapted()
        set_peft_model_state_dict(model, load_file(adapter))
        return self._loss(model)

    def _adapted(self) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from training.gemma_lora import weights_dtype

        base = AutoModelForCausalLM.from_pretrained(self.base_folder, dtype=weights_dtype())
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **self.lora))

    def _loss(self, model: Any) -> float:
        import torch

        from benchmarks.rows import as_dataset
        from training.batches import Batches, held_out_loss

        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        loss = held_out_loss(model.get_base_model(), Batches(as_dataset(self.rows), 32, self.budget, seed=None))
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return loss


def _count(rows: list[dict[str, Any]]) -> tuple[list[int], int]:
    lengths = [len(row["input_ids"]) for row in rows]
    return lengths, sum(end - first for row in rows for first, end in row["learned"])


def _without_folder(word: str) -> str:
    """Where a user's files lie is nobody's business."""
    name, _, value = word.partition("=")
    return f"{name}={Path(value).name}" if name in ("task.data.source", "model.path") else word


if __name__ == "__main__":
    run(main)
