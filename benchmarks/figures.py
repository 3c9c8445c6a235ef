"""The figures that README.md and docs/ quote, each computed from a file that a command wrote.

A figure stands between marks that do not show when the page is rendered:

    trains <!--figure train-speedup-fp32-->11.4<!--/figure--> times as fast

`make docs` computes every one of them anew (`write`), and a test fails where a page says something else. Where several
machines were measured, a sentence quotes the one that it names: `AMX` is the Xeon of the first measurements.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.table import speedup
from core.files import write_whole

RESULTS = Path("benchmarks/results")
AMX = "intel-xeon-processor-2-cores-gemma-3-270m"
GEMMA_4 = "amd-epyc-2-cores-random-gemma-4-e2b-10-layers"
MARK = re.compile(r"<!--figure ([\w-]+)-->(.*?)<!--/figure-->", re.DOTALL)


def result_file(kind: str, *parts: str) -> Path:
    """Where a benchmark of `kind` keeps its result, named by `parts` (machine, model …); makes the folder."""
    folder = RESULTS / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-") + ".json")


def partial_file(file: Path) -> Path:
    """Where what a benchmark has found so far is kept until its result is `file`; no page shows it."""
    return file.with_suffix(".partial.json")


def publish(file: Path) -> str:
    """Make of what a finished benchmark has in `partial_file(file)` its result, unless the one that the pages show has
    systems which this run left out; in words."""
    partial = partial_file(file)
    known, found = (json.loads(path.read_text())["systems"] if path.exists() else {} for path in (file, partial))
    if lacking := [name for name in known if name not in found]:
        return f"{file} has {', '.join(lacking)} too and stays as it is; this run is in {partial}"
    partial.replace(file)
    return f"written: {file}, {', '.join(refresh())}"


def results(kind: str) -> list[Path]:
    """The result files of a kind, without what an interrupted benchmark has left."""
    return [file for file in sorted((RESULTS / kind).glob("*.json")) if not file.name.endswith(".partial.json")]


def pages() -> list[Path]:
    """Every page that may quote a figure."""
    return [*Path().glob("README.md"), *sorted(Path("docs").glob("*.md"))]


def render(text: str) -> str:
    """`text` with each quoted figure as the result files have it.

    Raises:
        KeyError: a figure that is not in FIGURES.
    """
    return MARK.sub(lambda mark: f"<!--figure {mark[1]}-->{FIGURES[mark[1]]()}<!--/figure-->", text)


def refresh() -> list[str]:
    """Write every page anew whose figures have changed; their names."""
    changed = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (made := render(text)) != text:
            write_whole(page, made)
            changed.append(page.name)
    return changed


# --- one figure ---------------------------------------------------------------------------------------------------


def _train(data: str = "all-slangs") -> dict[str, Any]:
    return _read(f"training/{AMX}-{data}.json")


def _serve(system: str, streams: int, measured: str = AMX) -> float:
    """Tokens per second."""
    return float(_read(f"serving/{measured}.json")["systems"][system]["streams"][str(streams)]["tokens_per_second"])


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _times(ratio: float | None) -> str:
    assert ratio is not None
    return f"{ratio:.1f}"


def _beside_openvino(streams: int) -> str:
    ours, theirs = (_serve(system, streams) for system in ("ours", "openvino-genai"))
    return f"{ours / theirs:.2f}"


def _memory_share(data: str = "all-slangs") -> str:
    systems = _train(data)["systems"]
    return f"{systems['ours']['peak_gib'] / systems['hf-fp32']['peak_gib']:.2f}"


def _default_runs() -> str:
    """A row for each machine on which `python -m benchmarks.default_run` recorded the README's first command."""
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in results("default-run")]
    lines = [
        f"| {row['machine']} | {row['training_seconds'] / 60:.1f} minutes | {row['peak_memory_gib']:.1f} GiB | "
        f"{row['perplexity_before']:.2f} → {row['perplexity_after']:.2f} |"
        for row in rows
    ]
    header = ["| machine | training | peak memory | held-out perplexity |", "|---|---|---|---|"]
    return "\n" + "\n".join([*header, *lines]) + "\n"


def _rows_of(table: str) -> str:
    """Rows of a data set in this repository; a CSV's header is none, and no cell of these holds a line break."""
    lines = Path(table).read_text(encoding="utf-8").splitlines()
    return str(len(lines) - table.endswith(".csv"))


def _models() -> str:
    return str(len(list(Path("nemo_configs/model").glob("*.yaml"))))


# --- a table, or a whole page's content ------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(cells)} |" for cells in rows)]
    return "\n" + "\n".join(lines) + "\n"


def _conversion_formats() -> str:
    from converters.convert import table  # with torch, for which nothing else here has to wait

    return f"\n{table()}\n"


def _conversion_speed() -> str:
    result = _read("convert.json")

    def cell(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            row["model"],
            row["by"],
            *(cell(row[key]) for key in ("gigabytes", "seconds", "seconds_to_write", "processor_seconds", "times_cp")),
            *(cell(row[key], 2) for key in ("peak_gib", "allowed_gib")),
        ]
        for row in result["rows"]
    ]
    header = ["model", "by", "GB", "seconds", "until written", "processor seconds", "× cp", "peak memory, GiB"]
    return _measured(result) + _table([*header, "2 × largest tensor + 1 GiB"], rows)


def _conversion_megatron() -> str:
    result = _read("convert_megatron.json")
    took = result["seconds"]
    against = {"written": "cp", "proof": "forward of both sides"}
    rows = [
        [part, f"{seconds:.2f}", f"{seconds / took[other]:.1f} × {other}" if (other := against.get(part)) else ""]
        for part, seconds in took.items()
    ]
    memory = dict(result["memory"])
    layers, allowed = memory.pop("layers"), memory.pop("allowed")
    peaks = [[command, f"{peak:.2f}", f"{allowed:.2f}"] for command, peak in memory.items()]
    header = [f"gemma-3-27b, {layers} of 62 layers", "peak memory, GiB", "2 × largest tensor + 1 GiB"]
    return (
        _measured(result)
        + _table([f"{result['model']}, {result['gigabytes']} GB", "seconds", ""], rows)
        + "\n"
        + _table(header, peaks)
    )


def _memory() -> str:
    result = _read("memory.json")
    rows = [
        [
            row["run"],
            " ".join(row["overrides"]),
            f"{row['expected_gib']:.2f}",
            f"{row['measured_gib']:.2f}",
            f"{row['expected_gib'] / row['measured_gib']:.2f}",
        ]
        for row in result["rows"]
    ]
    header = ["run", "overrides", "estimate, GiB", "measured, GiB", "estimate / measured"]
    return _measured(result) + _table(header, rows)


def _measured(result: dict[str, Any]) -> str:
    lacks = "".join(f" {sentence}" for sentence in table.left_out(result))
    return f"\n`{result['command']}` on {result['machine']}, {result['finished']}:{lacks}\n"


RUN_COLUMNS = ["training examples", "columns", "epochs", "rank", "learning rate", "steps", "training seconds"]
RUN_COLUMNS += ["validation loss", "held-out loss", "loss above the best", "held-out perplexity"]
RUN_COLUMNS += ["New term", "Well-formed", "Fits its scene"]


def _runs(name: str) -> str:
    """A row for each run of `benchmarks/trained.py`."""
    result = _read(name)
    rows, packages = result["systems"], result["packages"]
    columns = [column for column in RUN_COLUMNS if any(row.get(column) for row in rows.values())]
    return (
        f"{_measured(result)}\n{result['source']}, {result['rows_in']} rows, sha256 {result['source_sha256']}. Base "
        f"model: {result['model']}, {result['peft']} on all linear layers, seed {result['seed']}. Every run is "
        f"measured on the same {result['held_out_rows']} held-out rows with all columns. torch {packages['torch']}, "
        f"NeMo {packages['nemo-toolkit']}.\n"
        + _table(["run", *columns], [[run, *(row.get(column, "") for column in columns)] for run, row in rows.items()])
    )


def _attempts() -> str:
    samples = []
    for sample in _read("attempts.json")["samples"]:
        samples.append(f"**Prompt.** {sample['prompt']}\n")
        for name, text in sample["answers"].items():
            samples.append(f"{name}:\n\n" + "\n".join(f"> {line}".rstrip() for line in text.splitlines()) + "\n")
    return f"{_runs('attempts.json')}\n### Their answers\n\nThe first to each, none selected.\n\n" + "\n".join(samples)


def _sweep() -> str:
    return _runs("sweep.json") if (RESULTS / "sweep.json").exists() else "\nNot measured yet.\n"


def _training_speed() -> str:
    found = [_read(f"training/{file.name}") for file in results("training")]
    return "\n" + "\n".join(line for result in found for line in table.section(result))


def _serving_speed() -> str:
    found = [_read(f"serving/{file.name}") for file in results("serving")]
    return "".join("\n" + "\n".join(table.serving_table(result)) + "\n" for result in found)


def _fairness() -> str:
    """Beside each time, what it is of the one that it is held to: three times for a first token, twice for a next."""
    shown = ""
    for file in results("fairness"):
        result = _read(f"fairness/{file.name}")
        took = result["milliseconds"]
        rows = []
        for name, milliseconds in took.items():
            alone = took.get(name.partition(", ")[0] + ", alone", milliseconds)
            rows.append([name, f"{milliseconds:,.0f}", f"{milliseconds / alone:.1f}" if alone != milliseconds else ""])
        prompts = f"{result['model']}, prompts of {result['short']} and {result['long']:,} tokens"
        shown += _measured(result) + _table([prompts, "ms", "× alone"], rows)
    return shown or "\nNot measured yet.\n"


FIGURES: dict[str, Callable[[], str]] = {
    "default-runs": _default_runs,
    "attempts": _attempts,
    "sweep": _sweep,
    "conversion-formats": _conversion_formats,
    "conversion-speed": _conversion_speed,
    "conversion-megatron": _conversion_megatron,
    "memory": _memory,
    "training-speed": _training_speed,
    "serving-speed": _serving_speed,
    "fairness": _fairness,
    "models": _models,
    "rows-slang": lambda: _rows_of("tasks/slang/slang.csv"),
    "rows-reviews": lambda: _rows_of("tasks/reviews/squid_game_reviews.csv"),
    "rows-chat": lambda: _rows_of("tasks/chat/chat.jsonl"),
    "train-speedup-fp32": lambda: _times(speedup(_train(), "ours", "hf-fp32")),
    "train-speedup-bf16": lambda: _times(speedup(_train(), "ours", "hf-bf16-autocast")),
    "train-memory": _memory_share,
    "train-speedup-fp32-512": lambda: _times(speedup(_train("all-slangs-512"), "ours", "hf-fp32")),
    "train-speedup-bf16-512": lambda: _times(speedup(_train("all-slangs-512"), "ours", "hf-bf16-autocast")),
    "serve-speedup-8": lambda: f"{_serve('ours', 8) / _serve('transformers', 8):.0f}",
    "serve-gemma-4-speedup-8": lambda: _times(_serve("ours", 8, GEMMA_4) / _serve("transformers", 8, GEMMA_4)),
    **{f"serve-openvino-{streams}": partial(_beside_openvino, streams) for streams in (1, 4, 8, 32)},
}
