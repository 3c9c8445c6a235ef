"""Training speed of this project and its peers: same base, same samples, in interleaved rounds.

    python -m benchmarks.train task.data.source=all_slangs.csv          (what `make bench SOURCE=…` calls)
    python -m benchmarks.train systems=ours,hf-fp32 rows=64 rounds=5 length=512
    python -m benchmarks.train task.data.source=reviews.csv text=review_text

Every system starts from the same adapter, and one evaluator measures the held-out loss of each after the same samples.
Writes benchmarks/results/training/<machine>-<model>-<data>.json, and docs/benchmarks.md from all of those. After each
round, what there is so far is in <…>.partial.json, which an interrupted benchmark leaves and no page shows.
"""

import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks import figures
from benchmarks.systems import SYSTEMS
from benchmarks.worker import ROOT, NotRun, Shares, TooLong, Worker, find_python, leave_out
from core.arguments import Arguments
from core.base_model import describe, ensure_base_model
from core.configuration import load_config, plain
from core.errors import UserError, run
from core.machine import confine_to_avx2
from core.schema import Config


class Options(Arguments):
    systems: list[Literal[tuple(SYSTEMS)]] = Field(list(SYSTEMS), description="those to measure")  # type: ignore[valid-type]
    rows: int | None = Field(None, ge=1, description="of a round; without it half a minute's work for the slowest")
    rounds: int = Field(3, ge=1, description="counted ones, whose median is the result")
    warmup: int = Field(2, ge=1, description="optimizer steps before them, which are not counted")
    length: int | None = Field(None, ge=2, description="tokens of every row; without it the rows are as they are")
    text: str | None = Field(None, description="the one column to train on, for a table that is no task")
    random: str | None = Field(None, description="an architecture of random_base.py with random weights, as base")
    minutes: float = Field(
        45, gt=0, description="for everything: a system that has used its share is stopped, and what it lacks is said"
    )
    processor: Literal["avx2"] | None = Field(None, description="measure as on an ordinary one: without AVX-512")


def main(argv: list[str]) -> None:
    config, options = load_config(argv, Options)
    if options.processor:
        confine_to_avx2()
    source = Path(config.task.data.source)
    config = config.model_copy(update={"data_dir": str(Path(config.data_dir).parent / f"bench-{source.stem}")})
    if options.text:
        from benchmarks.samples import text_task

        config = text_task(config, options.text)

    from benchmarks import table

    base_folder = ensure_base_model(config.model).resolve()
    if options.random:
        from benchmarks.random_base import random_base

        base_folder = random_base(options.random, base_folder, Path(config.model.models_dir)).resolve()
    from core.files import write_json

    file: Path | None = None

    def keep(result: dict[str, Any]) -> None:
        nonlocal file
        result["command"] = shlex.join(["python", "-m", "benchmarks.train", *map(_without_folder, argv)])
        result["data"]["source"] = source.name
        name = [result["machine"], result["model"], source.stem, *([str(options.length)] if options.length else [])]
        file = figures.result_file("training", *name)
        write_json(figures.partial_file(file), result)

    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
            result = measure(options, config, base_folder, Path(scratch), keep)
    except KeyboardInterrupt:
        if file:
            print(f"\nWhat was measured until now: {figures.partial_file(file)}", flush=True)
        raise
    keep(result)
    assert file
    table.show(result)
    print(figures.publish(file))
    table.plot([json.loads(other.read_text()) for other in figures.results("training")])


def measure(
    options: Options, config: Config, base_folder: Path, scratch: Path, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the rounds and collect everything that table.py shows; `keep` gets what there is after each round."""
    deadline = time.monotonic() + options.minutes * 60
    from transformers import AutoConfig

    from benchmarks import roofline
    from benchmarks.samples import as_dataset, read_samples
    from benchmarks.systems import Job
    from core.load_model import lora_settings
    from core.machine import describe_environment, quiet_libraries, short_machine_name
    from training.flops import flops_of

    quiet_libraries()
    from training.batches import Batches
    from training.gemma_lora import weights_dtype
    from training.memory import GIB, estimate, largest_micro_batch

    on_gpu, settings = config.trainer.accelerator == "gpu", config.task.train
    step_tokens, peer_tokens = (32_768, 8192) if on_gpu else (4096, 2048)
    # The same number of tokens per step at every length, as far as whole samples allow.
    batch = max(1, step_tokens // options.length) if options.length else settings.batch_size
    wanted = options.rows or batch * ((16 if on_gpu else 1) if options.length else (32 if on_gpu else 2))
    steps = [options.warmup, *[-(-wanted // batch)] * options.rounds]
    training, held_out = read_samples(config, base_folder, options.length, sum(steps) * batch)
    measured = training[steps[0] * batch :]
    lengths, target_tokens = _count(measured)
    max_length = max(len(row["input_ids"]) for row in training)
    micro = max(1, min(8, batch, peer_tokens // max_length))  # peers hold a megabyte of logits per token, or more
    while batch % micro:
        micro -= 1
    if config.peft.quantization:
        raise UserError("the benchmark compares LoRA on the whole base: peft=lora")
    lora = lora_settings(plain(config.peft))

    (scratch / "samples.json").write_text(json.dumps(training))
    in_order = Batches(as_dataset(training), batch, config.trainer.micro_batch_tokens, seed=None)
    expected = estimate(config, base_folder, weights_dtype(), *largest_micro_batch(in_order))
    initial = scratch / "initial.safetensors"
    evaluator = Evaluator(base_folder, lora, held_out, config.trainer.micro_batch_tokens)
    began = time.monotonic()
    before = evaluator.begin(config.seed, initial)
    evaluation_seconds = time.monotonic() - began
    recipe = write_recipe(config, base_folder, training, steps, batch, micro, scratch)
    jobs = {
        name: Job(
            base_folder=str(base_folder),
            dtype=str(weights_dtype()).removeprefix("torch."),
            lora=lora,
            initial=str(initial),
            samples=str(scratch / "samples.json"),
            steps=steps,
            batch=batch,
            micro_batch=micro,
            micro_batch_tokens=config.trainer.micro_batch_tokens,
            pack_tokens=max(max_length, 4096 if on_gpu else 1024),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            seed=config.seed,
            prompt=plain(config.task.prompt),
            recipe=str(recipe),
            adapter=str(scratch / f"{name}.safetensors"),
        )
        for name in dict.fromkeys(options.systems)
    }
    print(
        f"{len(measured)} samples in {options.rounds} rounds, {sum(lengths):,} tokens, of which {target_tokens:,} are "
        f"target tokens; {batch} samples per step, {micro} per micro-batch for peers",
        flush=True,
    )
    gemma = AutoConfig.from_pretrained(base_folder)
    tokens_at_once = min(config.trainer.micro_batch_tokens, batch * sum(lengths) // len(lengths))
    shape = gemma, tokens_at_once, max(1, tokens_at_once * target_tokens // sum(lengths))
    print("Measuring the roofline, before and after the rounds (some seconds)", flush=True)
    began = time.monotonic()
    rates = roofline.measure(*shape)
    deadline -= time.monotonic() - began
    flops = flops_of(gemma, lengths, target_tokens, lora["r"], lora["target_modules"])
    environment = describe_environment()

    def result(systems: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": environment.gpus[0] if environment.gpus else short_machine_name(),
            "environment": environment.model_dump(include={"commit", "python", "cpu", "cores", "memory_gib", "gpus"}),
            "versions": {name: system["versions"] for name, system in systems.items() if "versions" in system},
            "model": f"{options.random} (random weights)" if options.random else describe(base_folder)["name"],
            "data": {
                "length": options.length,
                "rows": len(measured),
                "tokens": sum(lengths),
                "learned": target_tokens,
                "longest": max_length,
                "held_out_rows": len(held_out),
            },
            "settings": {
                "lora": lora,
                "dtype": str(weights_dtype()).removeprefix("torch."),
                "rows_per_step": batch,
                "peer_rows_at_once": micro,
                "steps": steps,
                "micro_batch_tokens": config.trainer.micro_batch_tokens,
                "learning_rate": settings.learning_rate,
                "weight_decay": settings.weight_decay,
                "clip": settings.clip,
                "seed": config.seed,
                "minutes": options.minutes,
            },
            "ceiling": rates,
            "flops": asdict(flops) | {"total": flops.total},
            "seconds_at_ceiling": {
                dtype: roofline.least_seconds(flops, rates[dtype]) for dtype in roofline.dtypes(rates)
            },
            "held_out_loss_before": before,
            "memory_expected_gib": expected.total / GIB,
            "systems": {
                name: {key: value for key, value in system.items() if key not in ("versions", "seen")}
                for name, system in systems.items()
            },
            "left_out": left_out(systems, options.rounds),
        }

    seconds = deadline - time.monotonic() - evaluation_seconds * len(jobs)
    if seconds <= 0:
        raise UserError(f"minutes={options.minutes:g} are not enough to measure held-out losses and the roofline")
    systems = run_rounds(jobs, scratch, seconds, lambda systems: keep(result(systems)))
    given = _count(training)
    for name, system in systems.items():  # a result is valid only for the very tokens that all systems were given
        seen = system.get("seen")
        if seen and seen != {"tokens": sum(given[0]), "learned": given[1]}:
            systems[name] = {
                "not_run": f"its loop saw {seen}, not the {sum(given[0])} tokens and {given[1]} target tokens"
            }
    for name, system in systems.items():
        if "seen" in system:
            system["held_out_loss"] = evaluator.loss(Path(jobs[name].adapter))
            keep(result(systems))
    rates = roofline.higher(rates, roofline.measure(*shape))
    return result(systems)


def left_out(systems: dict[str, dict[str, Any]], rounds: int) -> list[str]:
    """What the measured `systems` lack of `rounds` and a held-out loss, in words."""
    found = []
    for name, system in systems.items():
        if "rounds" in system:
            lacks = [f"{rounds - len(system['rounds'])} of {rounds} rounds"] if len(system["rounds"]) < rounds else []
            lacks += [] if "held_out_loss" in system else ["the held-out loss"]
            found += [f"{name}: {' and '.join(lacks)}{system.get('stopped', '')}"] if lacks else []
    return found


def write_recipe(
    config: Config,
    base_folder: Path,
    rows: list[dict[str, Any]],
    steps: list[int],
    batch: int,
    micro: int,
    scratch: Path,
) -> Path:
    """Write NeMo AutoModel's recipe as ENGINE=automodel does, for this job's steps; its environment has no OmegaConf.

    Returns:
        The folder with `recipe.yaml` and its samples.
    """
    import yaml

    from training import automodel

    folder = scratch / "automodel"
    folder.mkdir()
    automodel.write_samples(rows, folder / "training.jsonl")
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


def run_rounds(
    jobs: dict[str, Any],
    scratch: Path,
    seconds: float,
    after_round: Callable[[dict[str, dict[str, Any]]], None] = lambda systems: None,
) -> dict[str, dict[str, Any]]:
    """Start every system, then run its rounds in turn; one computes at a time.

    Args:
        seconds: for all, in equal shares; a system whose next round would go beyond its share is stopped.
        after_round: is given what is returned, of the counted rounds until then.

    Returns:
        Name → `{"rounds": [{"seconds", "tokens", "learned"}], "tokens_per_second", "versions", …}`, or
        `{"not_run": reason}`. `"seen"` and `"peak_gib"` are of a system that has run all rounds, `"stopped"` says why
        one has not.
    """
    from benchmarks.systems import Job

    found: dict[str, dict[str, Any]] = {}
    running: dict[str, Worker] = {}
    shares = Shares(jobs, seconds)
    try:
        steps = next(iter(jobs.values())).steps
        for name, job in jobs.items():
            assert isinstance(job, Job)
            try:
                print(f"  {name}: loading", flush=True)
                running[name] = start_worker(name, job, scratch)
                with shares.used_by(name) as left:
                    found[name] = {"versions": running[name].receive(left)["ready"], "rounds": []}
            except NotRun as reason:
                leave_out(name, reason, False, found, running, shares)
        for round_ in range(len(steps)):
            for name, worker in list(running.items()):
                done = found[name]["rounds"]
                try:
                    if round_ and shares.left(name) < done[-1]["seconds"] * steps[round_] / steps[round_ - 1]:
                        raise TooLong("has no time left for another round")
                    worker.send("go")
                    with shares.used_by(name) as left:
                        measured = worker.receive(left)
                    print(
                        f"  {name}: {'warm-up' if not round_ else f'round {round_}'}: {measured['seconds']:.2f} s, "
                        f"{measured['tokens'] / measured['seconds']:,.0f} tokens/s",
                        flush=True,
                    )
                    done.append(measured)
                    if round_ == len(steps) - 1:
                        found[name] |= {"peak_gib": worker.receive(60)["peak_gib"]}
                except NotRun as reason:
                    leave_out(name, reason, len(found[name]["rounds"]) > 1, found, running, shares)
            if round_:
                after_round(_rates(jobs, found, len(steps)))
    finally:
        for worker in running.values():
            worker.stop()
    return _rates(jobs, found, len(steps))


def _rates(jobs: Iterable[str], found: dict[str, dict[str, Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """What `run_rounds` returns, of what was `found` until now; `rounds` counts the warm-up too."""
    systems = {}
    for name in jobs:
        system = dict(found[name])
        if rounds_ := system.get("rounds"):
            if len(rounds_) == rounds:
                system["seen"] = {kind: sum(one[kind] for one in rounds_) for kind in ("tokens", "learned")}
            system["rounds"] = rounds_ = rounds_[1:]  # without the warm-up
            for rate, kind in (("tokens_per_second", "tokens"), ("learned_per_second", "learned")):
                system[rate] = statistics.median(one[kind] / one["seconds"] for one in rounds_)
        systems[name] = system
    return systems


def interpreter(name: str) -> str:
    """The Python interpreter that has the packages of the system `name`.

    Raises:
        NotRun: there is none, or the system needs a GPU and there is none.
    """
    import torch

    from benchmarks.systems import SYSTEMS

    system = SYSTEMS[name]
    if system.train is None:
        raise NotRun(system.reason)
    if system.needs_cuda and not torch.cuda.is_available():
        raise NotRun("needs an NVIDIA GPU")
    interpreters = (sys.executable, str(ROOT / system.environment / "bin/python"))
    return find_python(system.package, interpreters, system.environment)


def start_worker(name: str, job: Any, scratch: Path) -> Worker:
    """The process of the system `name`; see benchmarks/systems.py.

    Raises:
        NotRun: it cannot run here.
    """
    python = interpreter(name)
    file = scratch / f"{name}.job.json"
    file.write_text(json.dumps(asdict(job)))
    # One device: Hugging Face's Trainer would use all of them in one process.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": visible}
    return Worker([python, "-m", "benchmarks.systems", name, str(file)], scratch / f"{name}.log", environment)


class Evaluator:
    """Held-out loss, computed by the same code for every adapter, on plain transformers and peft."""

    def __init__(self, base_folder: Path, lora: dict[str, Any], samples: list[dict[str, Any]], budget: int) -> None:
        self.base_folder, self.lora, self.samples, self.budget = base_folder, lora, samples, budget

    def begin(self, seed: int, initial: Path) -> float:
        """Write the initial adapter of every system, and return its loss, which is the base model's."""
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

        from benchmarks.samples import as_dataset
        from training.batches import Batches, held_out_loss

        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        loss = held_out_loss(model.get_base_model(), Batches(as_dataset(self.samples), 32, self.budget, seed=None))
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return loss


def _count(rows: list[dict[str, Any]]) -> tuple[list[int], int]:
    lengths = [len(row["input_ids"]) for row in rows]
    return lengths, sum(end - first for row in rows for first, end in row["target_ranges"])


def _without_folder(argument: str) -> str:
    """An argument without the folder of a user's file, for the published results."""
    name, _, value = argument.partition("=")
    return f"{name}={Path(value).name}" if name in ("task.data.source", "model.path") else argument


if __name__ == "__main__":
    run(main)
