"""The figures that README.md and docs/ quote, each computed from a file that a command wrote.

A figure stands between marks that do not show when the page is rendered:

    trains <!--figure train-speedup-fp32-->11.4<!--/figure--> times as fast

`make docs` computes every one of them anew (`write`), and a test fails where a page says something else. Where several
machines were measured, a sentence quotes the one that it names: `AMX` is the Xeon of the first measurements.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.table import speedup

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
AMX = "intel-xeon-processor-2-cores-gemma-3-270m"
MARK = re.compile(r"<!--figure ([\w-]+)-->(.*?)<!--/figure-->", re.DOTALL)


def pages() -> list[Path]:
    """Every page that may quote a figure."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """`text` with each quoted figure as the result files have it.

    Raises:
        KeyError: a figure that is not in FIGURES.
    """
    return MARK.sub(lambda mark: f"<!--figure {mark[1]}-->{FIGURES[mark[1]]()}<!--/figure-->", text)


def _train(data: str = "all-slangs") -> dict[str, Any]:
    return _read(f"{AMX}-{data}.json")


def _serve(system: str, streams: int) -> dict[str, float]:
    return _read(f"serving/{AMX}.json")["systems"][system]["streams"][str(streams)]


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _times(ratio: float | None) -> str:
    assert ratio is not None
    return f"{ratio:.1f}"


def _memory_share(data: str = "all-slangs") -> str:
    systems = _train(data)["systems"]
    return f"{systems['ours']['peak_gib'] / systems['hf-fp32']['peak_gib']:.2f}"


def _default_runs() -> str:
    """A table row for each machine on which `python -m benchmarks.default_run` has recorded the README's first command."""
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((RESULTS / "default-run").glob("*.json"))]
    lines = [
        f"| {row['machine']} | {row['training_seconds'] / 60:.1f} minutes | {row['peak_memory_gib']:.1f} GiB | "
        f"{row['perplexity_before']:.2f} → {row['perplexity_after']:.2f} |"
        for row in rows
    ]
    header = ["| machine | training | peak memory | held-out perplexity |", "|---|---|---|---|"]
    return "\n" + "\n".join([*header, *lines]) + "\n"


def _rows_of(table: str) -> str:
    """Rows of a data set in this repository; a CSV's header is none, and no cell of these holds a line break."""
    lines = (ROOT / table).read_text(encoding="utf-8").splitlines()
    return str(len(lines) - table.endswith(".csv"))


def _models() -> str:
    return str(len(list((ROOT / "nemo_configs" / "model").glob("*.yaml"))))


FIGURES: dict[str, Callable[[], str]] = {
    "default-runs": _default_runs,
    "models": _models,
    "rows-slang": lambda: _rows_of("tasks/slang/slang.csv"),
    "rows-reviews": lambda: _rows_of("tasks/reviews/squid_game_reviews.csv"),
    "rows-chat": lambda: _rows_of("tasks/chat/chat.jsonl"),
    "train-speedup-fp32": lambda: _times(speedup(_train(), "ours", "hf-fp32")),
    "train-speedup-bf16": lambda: _times(speedup(_train(), "ours", "hf-bf16-autocast")),
    "train-memory": _memory_share,
    "train-speedup-fp32-512": lambda: _times(speedup(_train("all-slangs-512"), "ours", "hf-fp32")),
    "train-speedup-bf16-512": lambda: _times(speedup(_train("all-slangs-512"), "ours", "hf-bf16-autocast")),
    "serve-tokens-8": lambda: f"{_serve('ours', 8)['tokens_per_second']:.0f}",
    "serve-speedup-8": lambda: (
        f"{_serve('ours', 8)['tokens_per_second'] / _serve('transformers', 8)['tokens_per_second']:.0f}"
    ),
    "serve-first-token-8": lambda: f"{1000 * _serve('ours', 8)['ttft_p50']:.0f}",
    **{
        f"serve-openvino-{streams}": lambda streams=streams: (  # type: ignore[misc]
            f"{_serve('ours', streams)['tokens_per_second'] / _serve('openvino-genai', streams)['tokens_per_second']:.2f}"
        )
        for streams in (1, 4, 8, 32)
    },
}
