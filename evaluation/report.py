"""A run on one page: did it work, how did it learn, from which data, and everything needed to do it again.

    python -m commands.report task=slang               (the newest finished run's; run=FOLDER another's)

Training writes the page with three questions. This command asks `task.evaluate`'s, of base and fine-tuned model, with
several seeds (evaluation/generations.py), measures the answers (evaluation/metrics.py), lets a judge compare them where
there is one (evaluation/judge.py), and writes the page again. What was made before is kept and not made twice.

`report.html` in the run's folder is one file that asks nothing of the network and runs no script. The same run gives
the same bytes. `report.html.j2` holds the words and `page.css` the style, plots.py draws.
"""

import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from difflib import SequenceMatcher
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup, escape

from core.artifacts import Estimate, Generation, Labels, Measurement, MetricResult, Metrics
from core.configuration import plain
from core.errors import UserError
from core.files import write_whole
from core.prompt import Prompt
from core.run_folder import Run, base_of, median
from core.schema import Config
from evaluation.gate import gain
from evaluation.intervals import held_out
from evaluation.labels import measure_labels
from evaluation.metrics import Evidence, measure
from evaluation.plots import SHARES, draw
from evaluation.questions import check, held_out_questions, listed_questions

ALIKE = 0.5  # of the words of two answers: from here on their differences are marked


def evaluate(finished: Run, config: Config) -> None:
    """Ask, measure and judge a run: write `generations.jsonl`, `metrics.json` and `judgements.jsonl` into its folder.

    Raises:
        UserError: there is no question to ask, the data is not what the run was trained on, the base model is missing,
            or the judge does not answer.
    """
    from evaluation import generations, judge

    settings, prompt = check(config), Prompt(**finished.config["task"]["prompt"])
    data_folder, base_folder = finished.data_folder(config), base_of(finished, config)
    questions = listed_questions(settings["questions"], prompt)
    questions += held_out_questions(data_folder / "test.jsonl", settings["held_out"], prompt)
    if not questions:
        raise UserError("nothing to ask: task.evaluate.questions is empty and task.evaluate.held_out is 0")
    answers = generations.generate(finished, config, questions)
    evidence = Evidence(data_folder, base_folder, finished.config)
    metrics, scores = measure(answers, evidence, settings["metrics"])
    Metrics(
        sampling=plain(config.task.generate),
        settings=settings,
        held_out=held_out(finished.evaluation),
        metrics=metrics,
        scores=scores,
        judge=judge.judge(finished.folder, config, answers),
        labels=measure_labels(answers, evidence),
    ).write(finished.folder / "metrics.json")


def write(run_folder: Path) -> Path:
    """Make `report.html` of a run that has its `evaluation.json`; it appears whole or not at all."""
    shown = Run.read(run_folder)
    ended = datetime.fromisoformat(shown.evaluation.finished)
    intervals = held_out(shown.evaluation)
    return write_page(
        run_folder / "report.html",
        "report.html.j2",
        {
            "config": shown.config,
            "config_text": (run_folder / "config.yaml").read_text(encoding="utf-8"),
            "run_name": run_folder.resolve().name,
            "ended": f"{ended.day} {ended:%B %Y, %H:%M} UTC",
            "evaluation": shown.evaluation,
            "change": -gain(shown.evaluation),
            "held_out": intervals,
            "metrics": shown.metrics,
            "label_table": _label_rows(shown.metrics.labels) if shown.metrics and shown.metrics.labels else [],
            "confused": _confused(shown.metrics.labels) if shown.metrics and shown.metrics.labels else [],
            "table": [_row(metric) for metric in shown.metrics.metrics] if shown.metrics else [],
            "conversations": _conversations(shown),
            "manifest": shown.manifest,
            "environment": shown.environment,
            "base": _read_base(shown.archive),
            "archive_name": shown.archive.name,
            "archive_bytes": shown.archive.stat().st_size if shown.archive.exists() else 0,
            "steps": shown.steps[-1].step if shown.steps else 0,
            "train_seconds": shown.seconds,
            "step_seconds": shown.step_seconds,
            "speed": shown.tokens_per_second,
            "padding": median(line.padding for line in shown.steps),
            "mfu": median(line.mfu for line in shown.steps),
            "best": min(shown.validations, key=lambda line: line.val_loss or 0, default=None),
            "last": shown.validations[-1] if shown.validations else None,
            "plots": draw(shown, intervals),
        },
    )


def write_page(file: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Fill a template of this folder."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,  # what a run lacks is left out
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    write_whole(file, environment.get_template(template).render(values).encode(errors="replace"))
    return file


# --- what the run left ----------------------------------------------------------------------------------------


def _read_base(archive: Path) -> dict[str, Any]:
    """`{"name", "source", "revision", "sha256"}` of the base model, which the `.nemo` carries; {} without one."""
    try:
        with tarfile.open(archive) as tar:
            name = next(name for name in tar.getnames() if name.removeprefix("./") == "model_config.yaml")
            return yaml.safe_load(tar.extractfile(name).read())["base"]  # type: ignore[union-attr]
    except (OSError, tarfile.TarError, StopIteration, KeyError):
        return {}


@dataclass(frozen=True)
class Answers:
    """What both models answered with one seed, and their scores in words; "" where there are none."""

    before: str
    after: str
    scores_before: str = ""
    scores_after: str = ""


@dataclass(frozen=True)
class Conversation:
    """A question with the answers of both models, a pair for each seed.

    Attributes:
        opening, question, closing: the instruction. What all instructions begin and end with stands apart, so that the
            page can dim it.
        row: the line of `test.jsonl` that it comes from, with the example's own answer as `reference`.
    """

    opening: str
    question: str
    closing: str
    answers: list[Answers]
    row: int | None
    reference: str | None


def _conversations(shown: Run) -> list[Conversation]:
    """The questions of `make report` where it was called, else those of training."""
    scores = {}
    if shown.metrics:
        known = {metric.name: metric for metric in shown.metrics.metrics}
        for answer, found in shown.metrics.scores.items():
            scores[answer] = ", ".join(_score(known[name], value) for name, value in found.items())
    asked: dict[str, list[Generation]] = {}
    for one in _generations(shown):
        asked.setdefault(one.question, []).append(one)
    texts = [answers[0].asked for answers in asked.values()]
    opening = closing = ""
    if len(set(texts)) > 1:  # whole words only
        opening = re.sub(r"\w*$", "", _common_start(texts))
        rests = [text[len(opening) :][::-1] for text in texts]
        closing = re.sub(r"^\w*", "", _common_start(rests)[::-1])
    conversations = []
    for answers in asked.values():
        before, after = ({one.seed: one for one in answers if one.side == side} for side in ("before", "after"))
        pairs = [(before[seed], after[seed]) for seed in before if seed in after]
        first = answers[0]
        conversations.append(
            Conversation(
                opening,
                first.asked.removeprefix(opening).removesuffix(closing),
                closing,
                [
                    Answers(*_marked(one.text, other.text), scores.get(one.id, ""), scores.get(other.id, ""))
                    for one, other in pairs
                ],
                first.row,
                first.reference,
            )
        )
    return conversations


def _generations(shown: Run) -> list[Generation]:
    """Those of `make report`; before it, the answers that training left."""
    if shown.metrics:
        return Generation.read_lines(shown.folder / "generations.jsonl")
    evaluation = shown.evaluation
    sides: list[tuple[Literal["before", "after"], Measurement]] = [
        ("before", evaluation.before),
        ("after", evaluation.after),
    ]
    return [
        Generation(id="", side=side, question=str(number), asked=asked, text_in="", seed=0, text=text)
        for side, measured in sides
        for number, (asked, text) in enumerate(zip(evaluation.questions, measured.answers, strict=False))
    ]


def _common_start(texts: list[str]) -> str:
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


# --- in words and marks ---------------------------------------------------------------------------------------


def _marked(before: str, after: str) -> tuple[str, str]:
    """The two answers, with the words marked that only one of them has, where most words are the same."""
    texts = [re.findall(r"\s+|\S+", text) for text in (before, after)]
    matcher = SequenceMatcher(None, texts[0], texts[1], autojunk=False)
    if not ALIKE <= matcher.ratio() < 1:
        return before, after
    marked = [Markup(""), Markup("")]
    for same, *places in matcher.get_opcodes():
        for side, (start, end) in enumerate((places[:2], places[2:])):
            piece = escape("".join(texts[side][start:end]))
            marked[side] += piece if same == "equal" or not piece.strip() else Markup("<mark>{}</mark>").format(piece)
    return marked[0], marked[1]


class Cell(NamedTuple):
    """A value and its interval in words, e.g. `+0.4 words` and `-0.1 to +0.7`."""

    value: str
    range: str


@dataclass(frozen=True)
class Row:
    """A metric as the table shows it; `verdict` is "better", "worse" or, where it may be chance, ""."""

    title: str
    explanation: str
    questions: int
    before: Cell
    after: Cell
    difference: Cell
    reference: str
    verdict: str


def _row(metric: MetricResult) -> Row:
    unit = metric.unit
    _, low, high = metric.difference
    verdict = ""
    if metric.better and low is not None and high is not None and (low > 0 or high < 0):
        verdict = "better" if (low > 0) == (metric.better == "higher") else "worse"
    return Row(
        metric.title,
        metric.explanation,
        metric.questions,
        cell(metric.before, unit),
        cell(metric.after, unit),
        cell(metric.difference, unit, signed=True),
        "" if metric.reference is None else in_units(metric.reference, unit),
        verdict,
    )


def _label_rows(labels: Labels) -> list[Row]:
    """Accuracy and F1 as rows of a table."""
    found = {"Accuracy": labels.accuracy, "F1, mean over labels": labels.f1}
    return [
        _row(
            MetricResult(name=title, title=title, better="higher", unit="%", questions=labels.questions, **dict(change))
        )
        for title, change in found.items()
    ]


def _confused(labels: Labels) -> list[tuple[int, str, str]]:
    """`(rows, true label, named label)` of the fine-tuned model's mistakes, the most frequent first."""
    names = [label.label for label in labels.labels] + ["no label"]
    counts = enumerate(labels.confusion_after)
    wrong = [(count, names[t], names[n]) for t, row in counts for n, count in enumerate(row) if count and n != t]
    return sorted(wrong, key=lambda one: (-one[0], *one[1:]))


def cell(estimate: Estimate, unit: str, signed: bool = False) -> Cell:
    value, low, high = ("" if it is None else in_units(it, unit, signed) for it in estimate)
    low, high = (text.removesuffix(" points").removesuffix(f" {unit}") for text in (low, high))
    return Cell(value, f"{low} to {high}" if low else "")


def in_units(value: float, unit: str, signed: bool = False) -> str:
    """A metric's value: `43%`, `+5 points` where `signed`, `4.2 words`."""
    if unit in SHARES:
        return f"{100 * value:+.0f} points" if signed else f"{100 * value:.0f}%"
    return f"{value:{'+' if signed else ''}.1f} {unit}".strip()


def _score(metric: MetricResult, value: float) -> str:
    """The score of one answer, e.g. `new term: yes`."""
    title = metric.title[0].lower() + metric.title[1:]
    if metric.unit == "yes/no":
        return f"{title}: {'yes' if value else 'no'}"
    return f"{title}: {in_units(value, metric.unit).replace('.0 ', ' ')}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def show(metrics: Metrics) -> None:
    """Print the table of metrics in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "questions", "base model", "fine-tuned", "difference", "reference answers")
    for row in [*(_label_rows(metrics.labels) if metrics.labels else []), *map(_row, metrics.metrics)]:
        cells = [f"{it.value}\n[dim]{it.range}[/]" for it in (row.before, row.after, row.difference)]
        table.add_row(row.title, str(row.questions), *cells, row.reference)
    Console().print(table)
