"""Answers of the base and the fine-tuned model to the same questions, with several seeds: `generations.jsonl`.

With the data folder and `config.yaml`, the file holds everything that the metrics are computed from.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from core.artifacts import Generation
from core.configuration import plain
from core.files import write_whole
from core.progress import Progress
from core.run_folder import Run, base_of
from core.schema import Config
from evaluation.questions import Question

FILE = "generations.jsonl"
SIDES: tuple[Literal["before"], Literal["after"]] = ("before", "after")
# Answers at a time: with Gemma 3 270M on two cores, a token each of 32 answers takes twice as long as of 8. And tokens,
# as their keys and values stay in memory.
BATCH, TOKENS = 48, 12_000


def generate(run: Run, config: Config, questions: Sequence[Question]) -> list[Generation]:
    """Ask both models every question with `task.evaluate.seeds` seeds, and every held-out example with one.

    Answers that the file has are kept, so that a call resumes where it was interrupted; those to other questions are
    removed. Sampling is that of `config.task.generate`.
    """
    file, sampling, seeds = run.folder / FILE, plain(config.task.generate), config.task.evaluate.seeds
    wanted = [
        _unanswered(side, question, seed, sampling)
        for side in SIDES
        for question in questions
        for seed in range(1 if question.row else seeds)
    ]
    made = {one.id: one for one in Generation.read_lines(file)}
    if missing := [one for one in wanted if one.id not in made]:
        _write(file, [made[one.id] for one in wanted if one.id in made])
        _ask(missing, run, config, sampling)
        made = {one.id: one for one in Generation.read_lines(file)}
    generations = [made[one.id] for one in wanted]
    _write(file, generations)
    return generations


def _write(file: Path, generations: Sequence[Generation]) -> None:
    write_whole(file, "".join(one.to_line() for one in generations))


def _unanswered(
    side: Literal["before", "after"], question: Question, seed: int, sampling: Mapping[str, Any]
) -> Generation:
    """A line that lacks its answer. Its id changes with everything that decides the answer."""
    identity = json.dumps([side, question.id, question.text_in, question.reference, seed, sampling], sort_keys=True)
    generation = Generation(
        id=hashlib.sha256(identity.encode()).hexdigest()[:12],
        side=side,
        question=question.id,
        asked=question.asked,
        text_in=question.text_in,
        seed=seed,
    )
    if question.fields:
        generation.fields = dict(question.fields)
    if question.row:
        generation.reference, generation.row = question.reference, question.row
    return generation


def _ask(missing: Sequence[Generation], run: Run, config: Config, sampling: Mapping[str, Any]) -> None:
    """Answer `missing` and append them to the file, batch by batch."""
    print(f"Asking the base model and {run.folder.name} for {len(missing)} answers", flush=True)
    from converters.nemo_file import read_nemo
    from evaluation.compare import without_adapter
    from evaluation.sampling import sample

    nemo = read_nemo(run.archive)
    model, tokenizer = nemo.load_onto(base_of(run, config), as_trained=True)
    longest, done = sampling["max_new_tokens"], 0
    with (
        Progress("Answers", len(missing) * longest) as progress,
        (run.folder / FILE).open("a", encoding="utf-8") as out,
    ):
        for side in SIDES:
            with without_adapter(model) if side == "before" else nullcontext():
                for batch in _batches([one for one in missing if one.side == side], tokenizer, longest):
                    texts, seeds = [one.text_in for one in batch], [one.seed for one in batch]
                    answers = sample(model, tokenizer, nemo.prompt, texts, seeds, sampling, progress.advance)
                    for one, answer in zip(batch, answers, strict=True):
                        one.text, one.ended = answer
                        out.write(one.to_line())
                    out.flush()
                    done += len(batch)
                    progress.at(done * longest)  # most end before


def _batches(due: Sequence[Generation], tokenizer: Any, longest: int) -> Iterator[list[Generation]]:
    """What is asked together: texts of similar length, which need little padding."""
    ids = tokenizer([one.text_in for one in due]).input_ids if due else []
    lengths = {one.id: len(of_one) + longest for one, of_one in zip(due, ids, strict=True)}
    batch: list[Generation] = []
    for one in sorted(due, key=lambda one: lengths[one.id]):
        if batch and (len(batch) == BATCH or (len(batch) + 1) * lengths[one.id] > TOKENS):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
