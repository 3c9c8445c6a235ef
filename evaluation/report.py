"""A run on one page: did it work, how did it learn, from which data, and everything needed to do it again.

    python -m evaluation.report task=slang               (rewrites the newest finished run's; +run=FOLDER another's)

`report.html` in the run's folder is one file that asks nothing of the network and runs no script. The same run gives
the same bytes. `report.html.j2` holds the words and the style, plots.py draws.
"""

import json
import re
import statistics
import tarfile
from collections.abc import Mapping
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from evaluation.plots import Lines, draw
from evaluation.runs import newest_run, read_metrics
from nemo_configs.command_line import load_config, run


def write(run_folder: Path) -> Path:
    """Make `report.html` of a run that has its `evaluation.json`; it appears whole or not at all."""
    config_text = (run_folder / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(config_text)
    evaluation, manifest = _read_json(run_folder / "evaluation.json"), _read_json(run_folder / "data_manifest.json")
    steps, validations = read_metrics(run_folder)
    archive = run_folder / f"{config['task']['name']}.nemo"
    ended = datetime.fromisoformat(evaluation["finished"])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,  # what a run lacks is left out
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = _duration
    page = environment.get_template("report.html.j2").render(
        config=config,
        config_text=config_text,
        run_name=run_folder.resolve().name,
        ended=f"{ended.day} {ended:%B %Y, %H:%M} UTC",
        evaluation=evaluation,
        change=evaluation["after"]["perplexity"] / evaluation["before"]["perplexity"] - 1,
        conversations=_conversations(evaluation),
        manifest=manifest,
        machine=_read_json(run_folder / "environment.json"),
        base=_read_base(archive),
        archive_name=archive.name,
        archive_bytes=archive.stat().st_size if archive.exists() else 0,
        steps=steps[-1]["step"] if steps else 0,
        train_seconds=sum(step.get("seconds", 0) for step in steps),
        step_seconds=_median(
            [{"seconds": line["seconds"] / line.get("steps", 1)} for line in steps if "seconds" in line], "seconds"
        ),
        speed=_median(steps, "tokens_per_second"),
        padding=_median(steps, "padding"),
        mfu=_median(steps, "mfu"),
        best=min(validations, key=lambda line: line["val_loss"], default=None),
        last=validations[-1] if validations else None,
        plots=draw(evaluation, steps, validations, manifest),
    )
    report = run_folder / "report.html"
    partial = report.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8", errors="replace")
    partial.rename(report)
    return report


# --- what the run left ----------------------------------------------------------------------------------------


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _read_base(archive: Path) -> dict[str, Any]:
    """`{"name", "source", "revision", "sha256"}` of the base model, which the `.nemo` carries; {} without one."""
    try:
        with tarfile.open(archive) as tar:
            name = next(name for name in tar.getnames() if name.removeprefix("./") == "model_config.yaml")
            return yaml.safe_load(tar.extractfile(name).read())["base"]  # type: ignore[union-attr]
    except (OSError, tarfile.TarError, StopIteration, KeyError):
        return {}


def _conversations(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each question with its answers; what all questions begin and end with stands apart, so that it can be dimmed."""
    questions = evaluation.get("questions", [])
    opening = closing = ""
    if len(set(questions)) > 1:  # whole words only
        opening = re.sub(r"\w*$", "", _common_start(questions))
        rests = [text[len(opening) :][::-1] for text in questions]
        closing = re.sub(r"^\w*", "", _common_start(rests)[::-1])
    before, after = (evaluation[side].get("answers", []) for side in ("before", "after"))
    return [
        {"opening": opening, "question": text.removeprefix(opening).removesuffix(closing), "closing": closing,
         "before": was, "after": now}
        for text, was, now in zip(questions, before, after, strict=False)
    ]  # fmt: skip


def _common_start(texts: list[str]) -> str:
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def _median(lines: Lines, key: str) -> float:
    values = [line[key] for line in lines if key in line]
    return statistics.median(values) if values else 0.0


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def main(words: list[str]) -> None:
    print(write(newest_run(load_config(words))))


if __name__ == "__main__":
    run(main)
