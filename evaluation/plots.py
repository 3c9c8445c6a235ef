"""The plots of a report, as SVG inside the page, with the colours of the page's style."""

import hashlib
import html
import io
import math
import re
import statistics
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.artifacts import Estimate, Evaluation, HeldOut, Manifest, MetricResult, MetricsLine
from core.run_folder import Run
from evaluation.intervals import held_out

POINTS = 400  # of a curve: a longer run's steps are averaged down to it, which keeps the page small
REASONS = 8  # for dropping rows that get a bar of their own
# Stand-ins, replaced by the CSS variables of these names, so that plots follow the reader's light or dark mode.
COLOURS = {name: f"#0{number}0b0d" for number, name in enumerate(["ink", "muted", "line", "grey", "blue", "orange"])}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "report",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["muted"],
}
CURVES = 8  # runs whose losses fit into one plot
SHARES = ("%", "yes/no")  # units of metrics from 0 to 1


def draw(shown: Run, intervals: HeldOut | None) -> dict[str, Markup]:
    """Every plot of a report by name, each a `<figure>`; empty where the run has no data for it."""
    with drawing():
        return {
            "perplexity": _perplexity(shown.evaluation, intervals),
            "shares": _shares(shown.metrics.metrics if shown.metrics else []),
            "loss": _loss(shown.steps, shown.validations),
            "learning_rate": _curve("Learning rate", "learning rate", shown.steps, "learning_rate"),
            "gradient": _curve("Gradient norm", "before clipping", shown.steps, "grad_norm"),
            "speed": _curve("Speed", "tokens per second", shown.steps, "tokens_per_second"),
            "splits": _splits(shown.manifest) if shown.manifest else Markup(""),
            "lengths": _lengths(shown.manifest) if shown.manifest else Markup(""),
            "fates": _fates(shown.manifest) if shown.manifest else Markup(""),
        }


def draw_comparison(runs: Sequence[Run]) -> dict[str, Markup]:
    """The plots of a comparison, the runs in the order given."""
    with drawing():
        names = [run.config.get("experiment_name") or run.folder.name for run in runs]
        intervals = [held_out(run.evaluation) for run in runs]
        found: dict[tuple[str, float], Estimate] = {}  # runs of one base share its bar
        for run, known in zip(runs, intervals, strict=True):
            value = run.evaluation.before.perplexity
            found[f"base: {run.config['model']['name']}", round(value, 2)] = (
                known.perplexity.before if known else (value, None, None)
            )
        items = [(name, estimate[0], f"{estimate[0]:,.2f}", "grey") for (name, _), estimate in found.items()]
        ranges = [estimate[1:] for estimate in found.values()]
        for name, run, known in zip(names, runs, intervals, strict=True):
            value = run.evaluation.after.perplexity
            items.append((name, value, f"{value:,.2f}", "blue"))
            ranges.append(known.perplexity.after[1:] if known else (None, None))
        speeds = [(name, run.tokens_per_second) for name, run in zip(names, runs, strict=True)]
        peaks = [(name, run.evaluation.peak_memory_gib or 0.0) for name, run in zip(names, runs, strict=True)]
        return {
            "perplexity": bars(
                "Held-out perplexity (lower is better)",
                "perplexity",
                items,
                ranges=ranges,
            ),
            "loss": _validation_losses(list(zip(names, runs, strict=True))),
            "speed": bars("Speed", "tokens per second", [(name, it, f"{it:,.0f}", "blue") for name, it in speeds]),
            "memory": bars("Peak memory", "GiB", [(name, it, f"{it:,.1f}", "blue") for name, it in peaks if it]),
        }


def _validation_losses(runs: Sequence[tuple[str, Run]]) -> Markup:
    """The validation losses of several runs over their steps."""
    shown = [(name, _thin(run.validations, "val_loss")[0]) for name, run in runs[:CURVES]]
    if not any(points for _, points in shown):
        return Markup("")
    axes, says = _axes(2.9), []
    for (name, points), (style, colour) in zip(
        shown, product(("-", "--", ":"), ("blue", "orange", "grey", "ink")), strict=False
    ):
        if points:
            axes.plot(*zip(*points, strict=True), f"o{style}", color=COLOURS[colour], lw=1.4, ms=3.5, label=name)
            says.append(f"{name}: {points[-1][1]:.3f} at step {points[-1][0]:.0f}")
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats per token)")
    axes.legend(loc="upper right", fontsize=8)
    return _svg(axes, "Validation loss", "; ".join(says))


@contextmanager
def drawing() -> Iterator[None]:
    # Letters that Matplotlib's own font lacks are drawn by the reader's browser.
    with matplotlib.rc_context(STYLE), warnings.catch_warnings(action="ignore", category=UserWarning):
        yield


def _perplexity(evaluation: Evaluation, intervals: HeldOut | None) -> Markup:
    before, after = evaluation.before.perplexity, evaluation.after.perplexity
    return bars(
        "Held-out perplexity (lower is better)",
        "perplexity",
        [("base model", before, f"{before:,.2f}", "grey"), ("fine-tuned", after, f"{after:,.2f}", "blue")],
        ranges=[intervals.perplexity.before[1:], intervals.perplexity.after[1:]] if intervals else None,
    )


def _shares(metrics: Sequence[MetricResult]) -> Markup:
    """Every share as two points with their intervals, base and fine-tuned, and a stroke for the reference answers."""
    shares = [metric for metric in metrics if metric.unit in SHARES]
    if not shares:
        return Markup("")
    axes = _axes(0.75 + 0.42 * len(shares))
    for place, metric in enumerate(shares):
        title = f"{metric.title} ({metric.questions} questions)"
        axes.text(0, place - 0.3, title, transform=axes.get_yaxis_transform(), color=COLOURS["muted"])
        for (value, low, high), colour, offset in ((metric.before, "grey", -0.06), (metric.after, "blue", 0.06)):
            if low is not None and high is not None:
                axes.plot([low, high], [place + offset] * 2, color=COLOURS[colour], lw=1.6, alpha=0.5)
            axes.plot([value], [place + offset], "o", color=COLOURS[colour], ms=5.5)
        if metric.reference is not None:
            axes.plot([metric.reference] * 2, [place - 0.18, place + 0.18], color=COLOURS["orange"], lw=1.6)
    for name, colour, marker in (
        ("base model", "grey", "o"),
        ("fine-tuned", "blue", "o"),
        ("reference answers", "orange", "|"),
    ):
        axes.plot([], [], marker, color=COLOURS[colour], label=name, ms=5.5)
    axes.set(yticks=[], ylim=(len(shares) - 0.6, -0.6), xlim=(-0.02, 1.02))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1), ncols=3, fontsize=8.5, handlelength=1.3, columnspacing=1.3)
    says = ", ".join(f"{it.title}: {it.before[0]:.0%} before, {it.after[0]:.0%} after" for it in shares)
    return _svg(axes, "Shares, with their ranges", says)


def _loss(steps: Sequence[MetricsLine], validations: Sequence[MetricsLine]) -> Markup:
    points, averaged = _thin(steps, "train_loss")
    checks, _ = _thin(validations, "val_loss")
    if not points and not checks:
        return Markup("")
    axes, says = _axes(2.9), []
    if points:
        at, losses = zip(*points, strict=True)
        wide = len(points) // 40
        name = f"training, mean of {averaged}" if averaged > 1 else "training"
        _line(axes, points, label=name, **({"lw": 0.8, "alpha": 0.55} if wide else {}))
        if wide:
            smooth = [statistics.fmean(losses[max(0, i - wide) : i + wide + 1]) for i in range(len(losses))]
            _line(axes, list(zip(at, smooth, strict=True)), label="smoothed")
        says.append(f"training from {losses[0]:.3f} to {losses[-1]:.3f} in {len(steps)} steps")
    if checks:
        axes.plot(*zip(*checks, strict=True), "o-", color=COLOURS["orange"], lw=1, ms=4.5, label="validation")
        says.append("validation " + ", ".join(f"{loss:.3f} at step {step:.0f}" for step, loss in checks[-20:]))
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1), ncols=3, fontsize=8.5, handlelength=1.3, columnspacing=1.3)
    return _svg(axes, "Loss", "; ".join(says))


def _curve(title: str, unit: str, steps: Sequence[MetricsLine], key: str) -> Markup:
    points, _ = _thin(steps, key)
    if not points:
        return Markup("")
    axes = _axes(2.1)
    _line(axes, points)
    axes.set(xlabel="optimizer step", ylabel=unit)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: _tick(value))
    values = [value for _, value in points]
    return _svg(axes, title, f"{values[0]:.4g} at first, {values[-1]:.4g} at last, {max(values):.4g} at most")


def _splits(manifest: Manifest) -> Markup:
    rows = {name: split.rows for name, split in manifest.splits.items()}
    return bars("Split sizes", "examples", [(name, count, f"{count:,}", "blue") for name, count in rows.items()])


def _lengths(manifest: Manifest) -> Markup:
    tokens = {name: split.tokens for name, split in manifest.splits.items() if split.tokens}
    found = [(name, t.mean, f"{t.mean:,.0f} mean, {t.max:,} longest", "blue") for name, t in tokens.items()]
    return bars("Length of an example", "tokens", found, [t.max for t in tokens.values()])


def _fates(manifest: Manifest) -> Markup:
    dropped = sorted(manifest.dropped.items(), key=lambda item: -item[1])
    fates = [("kept", manifest.rows_out), ("merged into another", manifest.merged)]
    fates += [(f"dropped: {reason}", count) for reason, count in dropped[:REASONS]]
    fates += [(f"dropped: {len(dropped) - REASONS} other reasons", sum(count for _, count in dropped[REASONS:]))]
    found = [(fate, count, f"{count:,}", "blue" if fate == "kept" else "grey") for fate, count in fates if count]
    return bars("Where the rows went", "rows", found)


def bars(
    title: str,
    unit: str,
    items: Sequence[tuple[str, float, str, str]],
    most: Sequence[float] | None = None,
    ranges: Sequence[Sequence[Any]] | None = None,
) -> Markup:
    """Horizontal bars of (name, value, text, colour), name and text above each.

    Args:
        most: extends each bar, paler.
        ranges: `[low, high]` of each, drawn as a line; `[None, None]` for unknown.
    """
    if not items:
        return Markup("")
    names = ["\n".join(textwrap.wrap(name, 46, max_lines=2, placeholder="…")) for name, *_ in items]
    axes, place = _axes(0.55 + sum(0.45 + 0.17 * name.count("\n") for name in names)), 0.0
    for number, (name, (_, value, text, colour)) in enumerate(zip(names, items, strict=True)):
        place += 1 + 0.38 * name.count("\n")
        if most:
            axes.barh(place, most[number], 0.3, color=COLOURS[colour], alpha=0.35, lw=0)
        axes.barh(place, value if math.isfinite(value) else 0, 0.3, color=COLOURS[colour], lw=0)
        if ranges and None not in ranges[number]:
            axes.plot(ranges[number], [place] * 2, "|-", color=COLOURS["ink"], lw=1, ms=5)
        axes.text(0, place - 0.24, name, transform=axes.get_yaxis_transform(), color=COLOURS["muted"])
        axes.text(1, place - 0.24, text, transform=axes.get_yaxis_transform(), ha="right", weight="bold")
    axes.set(xlabel=unit, yticks=[], ylim=(place + 0.3, 0.15))
    axes.set_xlim(left=0)
    axes.spines[:].set_visible(False)
    axes.grid(axis="x")
    return _svg(axes, title, ", ".join(f"{name}: {text}" for name, _, text, _ in items) + f" ({unit})")


def _thin(lines: Sequence[MetricsLine], key: str) -> tuple[list[tuple[float, float]], int]:
    """At most POINTS (step, value) pairs, each the mean of as many lines as the second result says."""
    points = [(line.step, value) for line in lines if math.isfinite(value := _value(line, key))]
    size = max(1, math.ceil(len(points) / POINTS))
    groups = [list(zip(*points[i : i + size], strict=True)) for i in range(0, len(points), size)]
    return [(statistics.fmean(steps), statistics.fmean(values)) for steps, values in groups], size


def _value(line: MetricsLine, key: str) -> float:
    value = getattr(line, key)
    return math.nan if value is None else value


def _line(axes: Axes, points: list[tuple[float, float]], **look: Any) -> None:
    axes.plot(*zip(*points, strict=True), "." if len(points) == 1 else "-", color=COLOURS["blue"], **{"lw": 1.6} | look)


def _tick(value: float) -> str:
    if 0 < value < 0.001:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _axes(height: float) -> Axes:
    axes = Figure(figsize=(4.6, height), layout="constrained").add_subplot()
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: _tick(value))
    return axes


def _svg(axes: Axes, title: str, says: str) -> Markup:
    """A `<figure>` of what is drawn; `says` is what a screen reader reads out."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    axes.get_figure(root=True).savefig(buffer, format="svg", transparent=True, metadata=nothing)  # type: ignore[union-attr]
    svg = buffer.getvalue().partition("<svg ")[2]
    svg = re.sub(r"<(metadata|style).*?</\1>|<!--.*?-->|\n\s*", " ", svg, flags=re.DOTALL)
    own = hashlib.sha256(svg.encode()).hexdigest()[:6]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)  # the plots share a page
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    label = html.escape(f"{title}: {says}")
    return Markup(f'<figure><figcaption>{title}</figcaption><svg role="img" aria-label="{label}" {svg}</figure>')
