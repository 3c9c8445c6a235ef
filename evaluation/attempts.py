"""The three attempts of the first slang generator, trained one after another and laid side by side.

    python -m evaluation.attempts task.data.source=all_slangs.csv      (what `make attempts SOURCE=…` calls)

Writes docs/attempts.md. A stopped attempt is continued and a finished one is not repeated, see training/__main__.py.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_prep.prepare import prepare
from evaluation.runs import read_metrics
from nemo_configs.command_line import UserError, load_config, run
from training.__main__ import name_run
from training.base_model import ensure_base_model
from training.identity import made_of

ATTEMPTS = ("attempt1", "attempt2", "attempt3")
TARGET = Path("docs/attempts.md")


def main(words: list[str]) -> None:
    TARGET.parent.mkdir(exist_ok=True)
    results = []
    for attempt in ATTEMPTS:
        # A limit of rows is for the attempts that take all of them; the first has its own, of 150.
        given = [word for word in words if attempt != "attempt1" or not word.startswith("task.data.train_rows=")]
        overrides = ["task=slang", f"+experiment={attempt}", *given]
        code = subprocess.run([sys.executable, "-m", "training", *overrides], check=False).returncode
        if code:
            raise UserError(f"{attempt} did not finish (exit code {code}). The same command goes on from there")
        config = load_config(overrides)
        base_folder = ensure_base_model(config.model)
        data_folder = prepare(config, base_folder / "tokenizer.json")
        results.append(read_run(name_run(config, base_folder, made_of(config, base_folder, data_folder))))
    held_out = {result["manifest"]["splits"]["test"]["sha256"] for result in results}
    if len(held_out) != 1:
        raise UserError("the attempts were measured on different held-out rows; run them on one SOURCE")
    TARGET.write_text(write(results, words), encoding="utf-8")
    print(f"\nwritten: {TARGET}")


def read_run(folder: Path) -> dict[str, Any]:
    """A finished run: its configuration, data manifest, metrics and evaluation."""
    from omegaconf import OmegaConf

    steps, validations = read_metrics(folder)
    return {
        "config": OmegaConf.load(folder / "config.yaml"),
        "manifest": json.loads((folder / "data_manifest.json").read_text()),
        "environment": json.loads((folder / "environment.json").read_text()),
        "evaluation": json.loads((folder / "evaluation.json").read_text()),
        "steps": steps,
        "validations": validations,
    }


def write(results: list[dict[str, Any]], words: list[str]) -> str:
    first = results[0]
    environment, before = first["environment"], first["evaluation"]["before"]
    table = [
        "| | training rows | columns | epochs | rank | steps | training time | tokens/s (median) | validation loss |"
        " held-out loss | held-out perplexity |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        f"| base model | | | | | | | | | {before['loss']:.3f} | {before['perplexity']:.2f} |",
    ]
    for result in results:
        config, steps = result["config"], result["steps"]
        columns = config.task.data.train_fields or ["slang", "description", "example", "context"]
        speed = statistics.median(step["tokens_per_second"] for step in steps)
        seconds = sum(step["seconds"] for step in steps)
        after = result["evaluation"]["after"]
        table.append(
            f"| {config.experiment_name} | {result['manifest']['splits']['training']['rows']} | {len(columns)} | "
            f"{config.task.train.epochs} | {config.peft.r} | {steps[-1]['step']} | {seconds / 60:.1f} min | "
            f"{speed:,.0f} | "
            f"{result['validations'][-1]['val_loss']:.3f} | {after['loss']:.3f} | {after['perplexity']:.2f} |"
        )
    answers = [("base model", before["answers"])]
    answers += [(result["config"].experiment_name, result["evaluation"]["after"]["answers"]) for result in results]
    samples = []
    for number, question in enumerate(first["evaluation"]["questions"]):
        samples.append(f"**Prompt.** {' '.join(question.split())}\n")
        for name, texts in answers:
            quoted = "\n".join(f"> {line}" for line in texts[number].splitlines())
            samples.append(f"{name}:\n\n{quoted}\n")
    source = first["manifest"]["source"]
    more = [word for word in words if not word.startswith(("task.data.source=", "model="))]
    arguments = f' ARGS="{" ".join(more)}"' if more else ""
    return "\n".join([
        "# The three attempts, measured",
        "",
        f"Made by `make attempts SOURCE={source['name']}{arguments}` (rows in: {first['manifest']['rows_in']}, sha256 "
        f"{source['sha256'][:12]}). Base: {first['config'].model.name}, "
        f"{first['config'].peft.name} on all linear layers; the authors' base was Gemma 2 2B. Every line is measured "
        f"on the same {first['evaluation']['held_out_rows']} held-out rows with all columns; loss is the mean "
        "cross-entropy of a response token.",
        "",
        f"Machine: {environment['cpu']}, {environment['cores']} cores, {', '.join(environment['gpus']) or 'no GPU'}; "
        f"torch {environment['packages']['torch']}, NeMo {environment['packages']['nemo-toolkit']}.",
        "",
        *table,
        "",
        "## What they answer",
        "",
        f"One sample each, seed {first['config'].seed}, nothing picked.",
        "",
        *samples,
    ])  # fmt: skip


if __name__ == "__main__":
    run(main)
