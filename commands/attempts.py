"""The three attempts of the first slang generator, trained one after another and laid side by side.

    python -m commands.attempts task.data.source=all_slangs.csv      (what `make attempts SOURCE=…` calls)

Writes docs/attempts.md. A stopped attempt is continued and a finished one is not repeated, see commands/train.py.
"""

import subprocess
import sys
from pathlib import Path

from commands.train import name_run
from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import UserError, run
from core.files import write_whole
from core.run_folder import Run
from data_prep.prepare import prepare
from evaluation.compare_runs import facts
from training.identity import made_of

ATTEMPTS = ("attempt1", "attempt2", "attempt3")
TARGET = Path("docs/attempts.md")
COLUMNS = (
    "run",
    "training examples",
    "columns",
    "epochs",
    "rank",
    "steps",
    "training time",
    "tokens/s (median)",
    "validation loss",
    "held-out loss",
    "held-out perplexity",
    "gain",
)


def main(words: list[str]) -> None:
    TARGET.parent.mkdir(exist_ok=True)
    results = []
    for attempt in ATTEMPTS:
        # A limit of rows is for the attempts that take all of them; the first has its own, of 150.
        given = [word for word in words if attempt != "attempt1" or not word.startswith("task.data.train_rows=")]
        overrides = ["task=slang", f"+experiment={attempt}", *given]
        code = subprocess.run([sys.executable, "-m", "commands.train", *overrides], check=False).returncode
        if code:
            raise UserError(f"{attempt} did not finish (exit code {code}). The same command goes on from there")
        config = load_config(overrides)
        base_folder = ensure_base_model(config.model)
        data_folder = prepare(config, base_folder / "tokenizer.json")
        results.append(Run.read(name_run(config, base_folder, made_of(config, base_folder, data_folder))))
    manifests = [result.manifest for result in results if result.manifest]
    if len({manifest.splits["test"].sha256 for manifest in manifests}) != 1:
        raise UserError("the attempts were measured on different held-out rows; run them on one SOURCE")
    write_whole(TARGET, write(results, words))
    print(f"\nwritten: {TARGET}")


def write(results: list[Run], words: list[str]) -> str:
    first = results[0]
    environment, before, manifest = first.environment, first.evaluation.before, first.manifest
    assert environment and manifest  # training writes them
    told = [facts(result) for result in results]
    given = [field for field, column in manifest.source.columns.items() if column]
    for row, result in zip(told, results, strict=True):
        row["columns"] = str(len(result.config["task"]["data"]["train_fields"] or given))
    base = {
        "run": "base model",
        "held-out loss": f"{before.loss:.3f}",
        "held-out perplexity": f"{before.perplexity:.2f}",
    }
    table = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    table += [f"| {' | '.join(row.get(column, '') for column in COLUMNS)} |" for row in (base, *told)]
    answers = [("base model", before.answers)]
    answers += [(row["run"], result.evaluation.after.answers) for row, result in zip(told, results, strict=True)]
    samples = []
    for number, question in enumerate(first.evaluation.questions):
        samples.append(f"**Prompt.** {' '.join(question.split())}\n")
        for name, texts in answers:
            quoted = "\n".join(f"> {line}" for line in texts[number].splitlines())
            samples.append(f"{name}:\n\n{quoted}\n")
    more = [word for word in words if not word.startswith(("task.data.source=", "model="))]
    arguments = f' ARGS="{" ".join(more)}"' if more else ""
    return "\n".join(
        [
            "# The three attempts, measured",
            "",
            f"Made by `make attempts SOURCE={manifest.source.name}{arguments}` (rows in: {manifest.rows_in}, sha256 "
            f"{manifest.source.sha256[:12]}). Base: {first.config['model']['name']}, "
            f"{first.config['peft']['name']} on all linear layers; the authors' base was Gemma 2 2B. Every line is "
            f"measured on the same {first.evaluation.held_out_rows} held-out rows with all columns; loss is "
            "the mean cross-entropy of a response token, gain the share by which the base's perplexity fell, with the "
            "range that it would keep in 95 of 100 cases with other rows.",
            "",
            f"Machine: {environment.cpu}, {environment.cores} cores, "
            f"{', '.join(environment.gpus) or 'no GPU'}; torch {environment.packages['torch']}, "
            f"NeMo {environment.packages['nemo-toolkit']}.",
            "",
            *table,
            "",
            "## What they answer",
            "",
            f"One sample each, seed {first.config['seed']}, nothing picked.",
            "",
            *samples,
        ]
    )


if __name__ == "__main__":
    run(main)
