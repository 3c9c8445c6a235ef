"""The three attempts of the first slang generator, trained one after another and laid side by side.

    python -m commands.attempts task.data.source=all_slangs.csv      (what `make attempts SOURCE=…` calls)

Writes benchmarks/results/attempts.json and docs/attempts.md. A stopped attempt is resumed and a finished one is not
repeated, see commands/train.py.
"""

import subprocess
import sys
from typing import Any

from benchmarks.figures import RESULTS, refresh
from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import UserError, run
from core.files import write_json
from core.run_folder import Run
from data_prep.prepare import prepare
from evaluation.compare_runs import facts
from training.fingerprint import name_run, run_fingerprint

ATTEMPTS = ("attempt1", "attempt2", "attempt3")


def main(argv: list[str]) -> None:
    load_config(["task=slang", *argv])  # a wrong argument is answered before anything is trained
    results = []
    for attempt in ATTEMPTS:
        # A limit of rows is for the attempts that take all of them; the first has its own, of 150.
        given = [word for word in argv if attempt != "attempt1" or not word.startswith("task.data.train_rows=")]
        overrides = ["task=slang", f"+experiment={attempt}", *given]
        code = subprocess.run([sys.executable, "-m", "commands.train", *overrides], check=False).returncode
        if code:
            raise UserError(f"{attempt} did not finish (exit code {code}). The same command goes on from there")
        config = load_config(overrides)
        base_folder = ensure_base_model(config.model)
        data_folder = prepare(config, base_folder / "tokenizer.json")
        results.append(Run.read(name_run(config, base_folder, run_fingerprint(config, base_folder, data_folder))))
    manifests = [result.manifest for result in results if result.manifest]
    if len({manifest.splits["test"].sha256 for manifest in manifests}) != 1:
        raise UserError("the attempts were measured on different held-out rows; run them on one SOURCE")
    write_json(RESULTS / "attempts.json", summarize(results, argv))
    print(f"\nwritten: {RESULTS / 'attempts.json'}, {', '.join(refresh())}")


def summarize(results: list[Run], argv: list[str]) -> dict[str, Any]:
    """What benchmarks/figures.py shows of the attempts."""
    first = results[0]
    environment, before, manifest = first.environment, first.evaluation.before, first.manifest
    assert environment and manifest  # training writes them
    table = [facts(result) for result in results]
    given = [field for field, column in manifest.source.columns.items() if column]
    for row, result in zip(table, results, strict=True):
        row["columns"] = str(len(result.config["task"]["data"]["train_fields"] or given))
    base = {
        "run": "base model",
        "held-out loss": f"{before.loss:.3f}",
        "held-out perplexity": f"{before.perplexity:.2f}",
    }
    answers = {"base model": before.answers}
    answers |= {row["run"]: result.evaluation.after.answers for row, result in zip(table, results, strict=True)}
    source = manifest.source
    more = [word for word in argv if not word.startswith(("task.data.source=", "model="))]
    arguments = f' ARGS="{" ".join(more)}"' if more else ""
    return {
        "command": f"make attempts SOURCE={source.name}{arguments}",
        "source": source.name,
        "source_sha256": source.sha256[:12],
        "rows_in": manifest.rows_in,
        "held_out_rows": first.evaluation.held_out_rows,
        "model": first.config["model"]["name"],
        "peft": first.config["peft"]["name"],
        "seed": first.config["seed"],
        "machine": environment.machine + ("" if environment.gpus else ", no GPU"),
        "packages": {name: environment.packages[name] for name in ("torch", "nemo-toolkit")},
        "table": [base, *table],
        "samples": [
            {"prompt": " ".join(question.split()), "answers": {name: texts[number] for name, texts in answers.items()}}
            for number, question in enumerate(first.evaluation.questions)
        ],
    }


if __name__ == "__main__":
    run(main)
