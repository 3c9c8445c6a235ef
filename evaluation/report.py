"""A run on one page: did it work, how did it learn, from which data, and everything needed to do it again.

    python -m commands.report task=slang               (the newest finished run's; +run=FOLDER another's)

Training writes the page with three questions. This command asks `task.evaluate`'s, of base and fine-tuned model, with
several seeds (evaluation/generations.py), measures the answers (evaluation/metrics.py), lets a judge compare them where
there is one (evaluation/judge.py), and writes the page again. What was made before is kept and not made twice.

`report.html` in the run's folder is one file that asks nothing of the network and runs no script. The same run gives
the same bytes. `report.html.j2` holds the words and `page.css` the style, plots.py draws.
"""

import re
import tarfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from difflib import SequenceMatcher
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup, escape
from omegaconf import DictConfig

from core.configuration import plain
from core.errors import UserError
from core.files import Lines, read_lines, write_json, write_whole
from core.prompt import Prompt
from core.run_folder import Run, base_of
from evaluation.gate import gain
from evaluation.intervals import held_out
from evaluation.metrics import Evidence, measure
from evaluation.plots import SHARES, draw
from evaluation.questions import check, held_out_questions, listed_questions

ALIKE = 0.5  # of the words of two answers: from here on their differences are marked


def evaluate(finished: Run, config: DictConfig) -> None:
    """Ask, measure and judge a run, into `generations.jsonl`, `metrics.json` and `judgements.jsonl` of its folder.

    Raises:
        UserError: no question to ask, other rows than it was trained on, no base model, a judge that does not answer.
    """
    from evaluation import generations, judge

    settings, prompt = check(config), Prompt(**finished.config["task"]["prompt"])
    data_folder, base_folder = finished.data_folder(config.data_dir), base_of(finished, config)
    questions = listed_questions(settings["questions"], prompt)
    questions += held_out_questions(data_folder / "test.jsonl", settings["held_out"], prompt)
    if not questions:
        raise UserError("nothing to ask: task.evaluate.questions is empty and task.evaluate.held_out is 0")
    lines = generations.generate(finished, config, questions)
    measured = measure(lines, Evidence(data_folder, base_folder, finished.config), settings["metrics"])
    write_json(
        finished.folder / "metrics.json",
        {
            "sampling": plain(config.task.generate),
            "settings": settings,
            "held_out": held_out(finished.evaluation),
            **measured,
            "judge": judge.judge(finished.folder, config, lines),
        },
    )


def write(run_folder: Path) -> Path:
    """Make `report.html` of a run that has its `evaluation.json`; it appears whole or not at all."""
    shown = Run.read(run_folder)
    ended = datetime.fromisoformat(shown.evaluation["finished"])
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
            "table": [_row(metric) for metric in shown.metrics.get("metrics", [])],
            "conversations": _conversations(shown),
            "manifest": shown.manifest,
            "machine": shown.environment,
            "base": _read_base(shown.archive),
            "archive_name": shown.archive.name,
            "archive_bytes": shown.archive.stat().st_size if shown.archive.exists() else 0,
            "steps": shown.steps[-1]["step"] if shown.steps else 0,
            "train_seconds": shown.seconds,
            "step_seconds": shown.step_seconds,
            "speed": shown.median("tokens_per_second"),
            "padding": shown.median("padding"),
            "mfu": shown.median("mfu"),
            "best": min(shown.validations, key=lambda line: line["val_loss"], default=None),
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


def _conversations(shown: Run) -> list[dict[str, Any]]:
    """Each question with its pairs of answers, those of `make report` where it was called, else those of training.

    What all questions begin and end with stands apart, so that it can be dimmed.
    """
    measured = {metric["name"]: metric for metric in shown.metrics.get("metrics", [])}
    scores = {
        line: ", ".join(_score(measured[name], value) for name, value in found.items())
        for line, found in shown.metrics.get("scores", {}).items()
    }
    asked: dict[str, dict[str, Any]] = {}
    for side, lines in _by_side(shown).items():
        for line in lines:
            turn = asked.setdefault(line["question"], {**line, "pairs": {}})
            answers = turn["pairs"].setdefault(line["seed"], {})
            answers |= {side: line["text"], f"scores_{side}": scores.get(line.get("id"), "")}
    texts = [turn["asked"] for turn in asked.values()]
    opening = closing = ""
    if len(set(texts)) > 1:  # whole words only
        opening = re.sub(r"\w*$", "", _common_start(texts))
        rests = [text[len(opening) :][::-1] for text in texts]
        closing = re.sub(r"^\w*", "", _common_start(rests)[::-1])
    return [
        {
            **turn,
            "opening": opening,
            "question": turn["asked"].removeprefix(opening).removesuffix(closing),
            "closing": closing,
            "answers": [_marked(pair) for pair in turn["pairs"].values() if "after" in pair],
        }
        for turn in asked.values()
    ]


def _by_side(shown: Run) -> dict[str, Lines]:
    if shown.metrics:
        lines = read_lines(shown.folder / "generations.jsonl")
        return {side: [line for line in lines if line["side"] == side] for side in ("before", "after")}
    questions = shown.evaluation.get("questions", [])
    return {
        side: [
            {"question": str(number), "asked": text, "seed": 0, "text": answer}
            for number, (text, answer) in enumerate(
                zip(questions, shown.evaluation[side].get("answers", []), strict=False)
            )
        ]
        for side in ("before", "after")
    }


def _common_start(texts: list[str]) -> str:
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


# --- in words and marks ---------------------------------------------------------------------------------------


def _marked(pair: dict[str, str]) -> dict[str, str]:
    """The two answers, with the words marked that only one of them has, where most words are the same."""
    texts = [re.findall(r"\s+|\S+", pair[side]) for side in ("before", "after")]
    matcher = SequenceMatcher(None, texts[0], texts[1], autojunk=False)
    if not ALIKE <= matcher.ratio() < 1:
        return pair
    marked = [Markup(""), Markup("")]
    for same, *places in matcher.get_opcodes():
        for side, (start, end) in enumerate((places[:2], places[2:])):
            piece = escape("".join(texts[side][start:end]))
            marked[side] += piece if same == "equal" or not piece.strip() else Markup("<mark>{}</mark>").format(piece)
    return {**pair, "before": marked[0], "after": marked[1]}


def _row(metric: Mapping[str, Any]) -> dict[str, Any]:
    """A metric as the table shows it."""
    unit = metric["unit"]
    _, low, high = metric["difference"]
    verdict = ""
    if metric["better"] and low is not None and (low > 0 or high < 0):
        verdict = "better" if (low > 0) == (metric["better"] == "higher") else "worse"
    return {
        **metric,
        **{side: cell(metric[side], unit) for side in ("before", "after")},
        "difference": cell(metric["difference"], unit, signed=True),
        "reference": "" if metric["reference"] is None else figure(metric["reference"], unit),
        "verdict": verdict,
    }


def cell(estimate: Sequence[Any], unit: str, signed: bool = False) -> dict[str, str]:
    """`{"value": "+0.4 words", "range": "-0.1 to +0.7"}`."""
    value, low, high = ("" if it is None else figure(it, unit, signed) for it in estimate)
    low, high = (text.removesuffix(" points").removesuffix(f" {unit}") for text in (low, high))
    return {"value": value, "range": f"{low} to {high}" if low else ""}


def figure(value: float, unit: str, signed: bool = False) -> str:
    """A metric's value: `43%`, `+5 points` where `signed`, `4.2 words`."""
    if unit in SHARES:
        return f"{100 * value:+.0f} points" if signed else f"{100 * value:.0f}%"
    return f"{value:{'+' if signed else ''}.1f} {unit}".strip()


def _score(metric: Mapping[str, Any], value: float) -> str:
    """What one answer reached, e.g. `new term: yes`."""
    title = metric["title"][0].lower() + metric["title"][1:]
    if metric["unit"] == "yes/no":
        return f"{title}: {'yes' if value else 'no'}"
    return f"{title}: {figure(value, metric['unit']).replace('.0 ', ' ')}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def show(metrics: Mapping[str, Any]) -> None:
    """The table of metrics in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "base model", "fine-tuned", "difference", "rows' own")
    for metric in metrics["metrics"]:
        row = _row(metric)
        cells = [f"{row[side]['value']}\n[dim]{row[side]['range']}[/]" for side in ("before", "after", "difference")]
        table.add_row(row["title"], *cells, row["reference"])
    Console().print(table)
