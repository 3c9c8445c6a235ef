"""The picture of what reviews say: for each aspect, how many reviews praise and how many criticise it."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tasks.reviews.knowledge import Aspect

MOST = 16  # aspects that get a bar
PRAISE, CRITICISM, MUTED = "#2f6fb3", "#d9772b", "#666666"  # told apart by colour-blind eyes too
STYLE: dict[Any, Any] = {"svg.hashsalt": "aspects", "svg.fonttype": "none", "text.parse_math": False, "font.size": 10}


def draw(file: Path, title: str, aspects: Sequence[Aspect]) -> None:
    """Diverging bars as SVG: criticism to the left, praise to the right, the most discussed aspect on top."""
    shown = [aspect for aspect in aspects if aspect.judged][:MOST][::-1]
    good, bad = ([len(aspect.praised_by) for aspect in shown], [len(aspect.criticised_by) for aspect in shown])
    # Letters that Matplotlib's own font lacks are drawn by the reader's browser.
    with matplotlib.rc_context(STYLE), warnings.catch_warnings(action="ignore", category=UserWarning):
        figure = Figure(figsize=(8, 1.2 + 0.32 * max(len(shown), 1)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(shown)), good, color=PRAISE, label="praise")
        axes.barh(range(len(shown)), [-count for count in bad], color=CRITICISM, label="criticism")
        reach = max([*good, *bad, 1])
        for place, (praise, criticism) in enumerate(zip(good, bad, strict=True)):
            axes.text(praise + 0.01 * reach, place, f"{praise}", va="center", color=MUTED, fontsize=9)
            axes.text(
                -criticism - 0.01 * reach, place, f"{criticism}", va="center", ha="right", color=MUTED, fontsize=9
            )
        axes.set_yticks(range(len(shown)), [aspect.name for aspect in shown])
        axes.set_xticks([])
        axes.set_xlim(-1.12 * max([*bad, 0.25 * reach]), 1.12 * max([*good, 0.25 * reach]))
        axes.axvline(0, color="white", lw=1)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{title}: reviews that criticise or praise an aspect", loc="left", fontsize=11)
        axes.legend(frameon=False, loc="lower right", fontsize=9)
        figure.savefig(file, format="svg", metadata={"Date": None})
