"""From a table to a fine-tuned Gemma: the whole recipe, top to bottom.

    python -m training task=slang                              (what `make train TASK=slang` calls)
    python -m training task=slang task.data.source=mine.csv seed=1
    python -m training task=slang +experiment=attempt2

A run is named by its configuration and its data. The same command given again continues a run that was stopped, and
only shows one that is finished; anything changed starts another.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from data_prep.prepare import prepare
from nemo_configs.command_line import UserError, load_config, plain, run
from training import automodel
from training.base_model import describe, ensure_base_model

ENGINES = ("lightning", "automodel")


def main(words: list[str]) -> None:
    config = load_config(words)
    print(f"Training {config.model.name} with {config.peft.name} on {config.task.name}, on this machine's "
          f"{config.trainer.accelerator.upper()}")  # fmt: skip
    if config.engine not in ENGINES:
        raise UserError(f"unknown engine '{config.engine}'. Known: {', '.join(ENGINES)}")
    if config.engine == "automodel":
        automodel.check(config)
    elif config.trainer.devices * config.trainer.num_nodes != 1:
        raise UserError("training with several devices is not built yet: set trainer.devices=1 trainer.num_nodes=1")
    base_folder = ensure_base_model(config.model)
    data_folder = prepare(config, base_folder / "tokenizer.json")
    run_folder = name_run(config, base_folder, data_folder)
    if (run_folder / "report.html").exists():
        print(f"{run_folder} is finished: this configuration on this data has been trained. Change something, for "
              f"example ARGS=seed=1, to train another")  # fmt: skip
        show_result(run_folder)
        return
    run_folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_folder / ".lock", timeout=0):
            train(config, base_folder, data_folder, run_folder)
    except Timeout:
        raise UserError(f"another process is training {run_folder}. Wait for it, or stop it") from None
    show_result(run_folder)


def name_run(config: DictConfig, base_folder: Path, data_folder: Path) -> Path:
    """`runs/<task>/<model>-<peft>[-automodel][-<experiment>]-<hash of configuration, base and data>`."""
    identity = plain(config)
    # Where files lie and how much memory a step may take do not change the result.
    for key in ("runs_dir", "data_dir"):
        identity.pop(key)
    identity["trainer"].pop("micro_batch_tokens")
    identity["model"] = describe(base_folder)["sha256"]
    manifest = json.loads((data_folder / "manifest.json").read_text())
    identity["data"] = {name: split["sha256"] for name, split in manifest["splits"].items()}
    identity["task"].pop("data")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    engine = "" if config.engine == "lightning" else config.engine
    parts = [describe(base_folder)["name"], config.peft.name, engine, config.experiment_name, digest]
    return Path(config.runs_dir) / config.task.name / "-".join(part for part in parts if part)


def train(config: DictConfig, base_folder: Path, data_folder: Path, run_folder: Path) -> None:
    """Fill `run_folder`; each file appears whole or not at all."""
    print("Loading NeMo (some seconds)", flush=True)
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from converters.nemo_file import read_nemo
    from data_prep.prompt import Prompt
    from evaluation import report
    from evaluation.compare import measure
    from evaluation.runs import read_metrics
    from training.batches import Batches, tokenize
    from training.fit import fit
    from training.gemma_lora import weights_dtype

    OmegaConf.save(config, run_folder / "config.yaml")
    shutil.copy(data_folder / "manifest.json", run_folder / "data_manifest.json")
    environment = describe_environment()
    if config.engine == "automodel":
        environment["packages"] |= automodel.versions()
    write_json(run_folder / "environment.json", environment)

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    prompt = Prompt(**plain(config.task.prompt))
    splits: dict[str, Any] = {}
    left_out: dict[str, int] = {}
    for name in ("training", "validation", "test"):
        rows, too_long = tokenize(data_folder / f"{name}.jsonl", tokenizer, prompt, config.task.train.max_length,
                                  cache=data_folder / ".tokens")  # fmt: skip
        splits[name], left_out[name] = rows, too_long
        if too_long:
            print(f"{name}: left out {too_long} rows longer than task.train.max_length={config.task.train.max_length}")
    held_out = Batches(splits["test"], 32, config.trainer.micro_batch_tokens, seed=None)
    questions = [prompt.write_instruction()] + [row["input"] for row in first_rows(data_folder / "test.jsonl", 2)]
    sampling = plain(config.task.generate)

    before_file = run_folder / "before.json"
    if not before_file.exists():
        print("Asking the base model first", flush=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=weights_dtype()).to(device).eval()
        write_json(before_file, measure(base, tokenizer, prompt, held_out, questions, sampling, config.seed))
        del base
    before = json.loads(before_file.read_text())
    print(f"  before: perplexity {before['perplexity']:.2f} on {len(splits['test'])} held-out rows. It answers:")
    print(indent(before["answers"][0]), flush=True)

    archive = run_folder / f"{config.task.name}.nemo"
    if not archive.exists():
        train_by = automodel.fit if config.engine == "automodel" else fit
        train_by(config, base_folder, splits["training"], splits["validation"], run_folder, archive)

    print("Asking the fine-tuned model", flush=True)
    model, tokenizer = read_nemo(archive).load_onto(base_folder)
    after = measure(model, tokenizer, prompt, held_out, questions, sampling, config.seed)
    steps = read_metrics(run_folder)[0]
    write_json(run_folder / "evaluation.json", {
        "held_out_rows": len(splits["test"]),
        "rows_over_max_length": left_out, "questions": questions, "before": before, "after": after,
        "training_seconds": round(sum(step["seconds"] for step in steps), 1),
        "peak_memory_gib": round(max([peak_memory_gib(), *(step.get("memory_gib", 0) for step in steps)]), 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    })  # fmt: skip
    report.write(run_folder)


def show_result(run_folder: Path) -> None:
    result = json.loads((run_folder / "evaluation.json").read_text())
    before, after = result["before"], result["after"]
    print(f"\nThe fine-tuned model answers:\n{indent(after['answers'][0])}\n")
    print(f"perplexity on {result['held_out_rows']} held-out rows: {before['perplexity']:.2f} before, "
          f"{after['perplexity']:.2f} after {result['training_seconds'] / 60:.1f} minutes of training, at most "
          f"{result['peak_memory_gib']:.1f} GiB of memory")  # fmt: skip
    print(f"model:  {next(run_folder.glob('*.nemo'))}\nreport: {run_folder / 'report.html'}")


def describe_environment() -> dict[str, Any]:
    """Versions and hardware, for the report and for whoever wants the same result again."""
    import platform

    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a container may have no git
        commit = ""
    packages = ["torch", "nemo-toolkit", "lightning", "transformers", "peft", "datasets", "omegaconf"]
    return {
        "command": shlex.join(["python", "-m", "training", *sys.argv[1:]]),
        "commit": commit,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def peak_memory_gib() -> float:
    """The most that this process has held: on the GPU where there is one, else in main memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    # Not getrusage's ru_maxrss: that begins at what the process that started this one held.
    held = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return int(held) / 2**20


def quiet_libraries() -> None:
    """NeMo, Lightning and its telemetry hook start with remarks that hide what a user needs to read."""
    import logging

    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)
    import lightning.pytorch
    from nemo.utils import logging as nemo_logging

    for name in (lightning.pytorch.__name__, "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    nemo_logging.setLevel(logging.ERROR)


def first_rows(file: Path, count: int) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


def write_json(file: Path, value: Any) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(file)


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


if __name__ == "__main__":
    run(main)
