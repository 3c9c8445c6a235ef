"""What both models are asked: the questions of `task.evaluate`, and held-out examples, whose answers are known."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.configuration import plain
from core.errors import UserError
from core.prompt import Prompt
from core.schema import Config
from data_prep.task import Task
from evaluation.metrics import metrics_of

BEGUN = 60  # words of a held-out text that the model is given, and of its own continuation that is compared


@dataclass(frozen=True)
class Question:
    """Something to ask a model.

    Attributes:
        id: `question 2`, or `row 17` for line 17 of `test.jsonl`.
        asked: the instruction, or the dialogue, as a person reads it.
        text_in: everything the model is given.
        fields: values of the prompt's fields, where they are known.
        reference: the example's own answer.
        row: the line of `test.jsonl`, from 1.
    """

    id: str
    asked: str
    text_in: str
    fields: Mapping[str, str]
    reference: str | None = None
    row: int | None = None


def check(config: Config) -> dict[str, Any]:
    """`task.evaluate` as a dictionary.

    Raises:
        UserError: there are no metrics of that name, or none that `min_scores` asks for; the prompt is broken; or a
            question does not fit it.
    """
    settings = plain(config.task.evaluate)
    known = [metric.score.__name__ for metric in metrics_of(settings["metrics"])]
    if unknown := [name for name in settings["min_scores"] if name not in known]:
        raise UserError(
            f"task.evaluate.min_scores: there is no metric {', '.join(unknown)}. Known: {', '.join(sorted(known))}"
        )
    listed_questions(settings["questions"], Task.of(config).prompt)
    return settings


def listed_questions(listed: Sequence[Any], prompt: Prompt) -> list[Question]:
    """The questions of `task.evaluate.questions`: each an instruction, fields of the prompt, or `{messages: [...]}`.

    Raises:
        UserError: a question that is none of these, or names a field that the prompt does not have.
    """
    known = {*prompt.fields, *re.findall(r"\{(\w+)\}", prompt.instruction)}
    questions = []
    for number, given in enumerate(listed, 1):
        name = f"question {number}"
        if isinstance(given, str):
            questions.append(Question(name, given, prompt.wrap(given), {}))
        elif isinstance(given, dict) and "messages" in given:
            questions.append(_dialogue(name, given["messages"], prompt))
        elif isinstance(given, dict):
            if unknown := sorted(given.keys() - known):
                raise UserError(
                    f"task.evaluate.questions, {name}: the prompt has no field {', '.join(unknown)}. "
                    f"Known: {', '.join(sorted(known))}"
                )
            fields = {**prompt.fields, **given}
            instruction = prompt.write_instruction(**given)
            questions.append(Question(name, instruction, prompt.wrap(instruction), fields))
        else:
            raise UserError(f"task.evaluate.questions, {name}: give a text, fields of the prompt or messages")
    return questions


def held_out_questions(file: Path, count: int, prompt: Prompt) -> list[Question]:
    """`count` examples of a split file, spread evenly over it, since similar ones are often neighbours."""
    known = re.findall(r"\{(\w+)\}", prompt.instruction)
    questions = []
    for number, example in _spread(file, count):
        name = f"row {number}"
        if "messages" in example:
            *history, last = example["messages"]
            asked = _dialogue(name, history, prompt)
            questions.append(Question(name, asked.asked, asked.text_in, {}, last["content"], number))
        elif "input" not in example:
            begun, rest = _begun(example["text"])
            if begun:
                questions.append(Question(name, begun, prompt.wrap(begun), {known[0]: begun}, rest, number))
        else:
            fields = {field: example[field] for field in known if isinstance(example.get(field), str)}
            text_in = prompt.wrap(example["input"])
            questions.append(Question(name, example["input"], text_in, fields, example["output"], number))
    return questions


def _begun(text: str) -> tuple[str, str]:
    """The first half of a plain text, `BEGUN` words at most, to be continued; and as many words of what follows."""
    words = re.findall(r"\s*\S+", text)
    half = min(len(words) // 2, BEGUN)
    return "".join(words[:half]), "".join(words[half : half + BEGUN])


def _spread(file: Path, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8") as lines:
        total = sum(1 for _ in lines)
    wanted = set(range(total)) if count >= total else {place * total // count for place in range(count)}
    with file.open(encoding="utf-8") as lines:
        for place, line in enumerate(lines):
            if place in wanted:
                yield place + 1, json.loads(line)


def _dialogue(name: str, messages: Sequence[Mapping[str, str]], prompt: Prompt) -> Question:
    try:
        text_in = prompt.wrap_dialogue(messages)
    except ValueError as error:
        raise UserError(f"{name} cannot be asked: {error}") from None
    asked = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    if len(messages) == 1:
        asked = messages[0]["content"]
    return Question(name, asked, text_in, {})
