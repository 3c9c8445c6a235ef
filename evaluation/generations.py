"""What the base model and the fine-tuned one answer to the same questions with several seeds: `generations.jsonl`.

A line is an answer: `{"id", "side": "before" or "after", "question", "asked", "text_in", "seed", "text", "ended"}`,
with `fields` where the prompt's fields are known, and `reference` and `row` (a line of `test.jsonl`) for a held-out
row. With the data folder and `config.yaml` it holds all that the metrics are computed from.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from omegaconf import DictConfig

from core.configuration import plain
from core.files import Lines, read_lines, to_line, write_lines
from core.progress import Progress
from core.run_folder import Run, base_of
from evaluation.questions import Question

FILE = "generations.jsonl"
BATCH = 16  # answers at a time: on one core with Gemma 3 270M they take no longer than one


def generate(run: Run, config: DictConfig, questions: Sequence[Question]) -> Lines:
    """Every question with `task.evaluate.seeds` seeds, and every held-out row with one, to both models.

    Answers that are there already are kept, so that a stopped call goes on where it was; those that this call does not
    ask for are left out. Sampling is that of `config.task.generate`.
    """
    file, sampling, seeds = run.folder / FILE, plain(config.task.generate), config.task.evaluate.seeds
    wanted = [
        _line(side, question, seed, sampling)
        for side in ("before", "after")
        for question in questions
        for seed in range(1 if question.row else seeds)
    ]
    made = {line["id"]: line for line in read_lines(file)}
    if missing := [line for line in wanted if line["id"] not in made]:
        write_lines(file, (made[line["id"]] for line in wanted if line["id"] in made))
        _ask(missing, run, config, sampling)
        made = {line["id"]: line for line in read_lines(file)}
    generations = [made[line["id"]] for line in wanted]
    write_lines(file, generations)
    return generations


def _line(side: str, question: Question, seed: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """An answer's line without the answer. Its id changes with all that decides the answer."""
    made_of = json.dumps([side, question.id, question.text_in, question.reference, seed, sampling], sort_keys=True)
    line = {
        "id": hashlib.sha256(made_of.encode()).hexdigest()[:12],
        "side": side,
        "question": question.id,
        "asked": question.asked,
        "text_in": question.text_in,
        "seed": seed,
        "fields": dict(question.fields),
        "reference": question.reference,
        "row": question.row,
    }
    return {key: value for key, value in line.items() if value not in (None, {})}


def _ask(missing: Lines, run: Run, config: DictConfig, sampling: Mapping[str, Any]) -> None:
    """Append the lines of `missing` with their answers, batch by batch."""
    print(f"Asking the base model and {run.folder.name} for {len(missing)} answers", flush=True)
    from converters.nemo_file import read_nemo
    from evaluation.compare import without_adapter
    from evaluation.sampling import sample

    nemo = read_nemo(run.archive)
    model, tokenizer = nemo.load_onto(base_of(run, config), as_trained=True)
    done = 0
    with Progress("Answers", len(missing)) as progress, (run.folder / FILE).open("a", encoding="utf-8") as out:
        for side, adapter in (("before", without_adapter(model)), ("after", nullcontext())):
            with adapter:
                # Texts of one length have no padding between them.
                lines = sorted((line for line in missing if line["side"] == side), key=lambda it: len(it["text_in"]))
                for batch in (lines[start : start + BATCH] for start in range(0, len(lines), BATCH)):
                    texts, seeds = [line["text_in"] for line in batch], [line["seed"] for line in batch]
                    answers = sample(model, tokenizer, nemo.prompt, texts, seeds, sampling)
                    for line, answer in zip(batch, answers, strict=True):
                        out.write(to_line(line | answer._asdict()))
                    out.flush()
                    done += len(batch)
                    progress.at(done)
