"""The plots of a report, as SVG that stands inside its page and takes its colours from the page's style."""

import html
import io
import math
import re
import statistics
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

POINTS = 400  # of a curve: a longer run's steps are averaged down to it, which keeps the page small
REASONS = 8  # for dropping rows that get a bar of their own
# Stand-ins, replaced by the CSS variables of these names, so that plots follow the reader's light or dark mode.
COLOURS = {name: f"#0{number}0b0d" for number, name in enumerate(["ink", "muted", "line", "grey", "blue", "orange"])}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "report", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.5,
    "axes.edgecolor": COLOURS["line"], "axes.labelcolor": COLOURS["muted"], "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.xmargin": 0.02, "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6, "xtick.color": COLOURS["muted"], "ytick.color": COLOURS["muted"], "xtick.major.size": 0,
    "ytick.major.size": 0, "text.color": COLOURS["ink"], "legend.frameon": False, "legend.labelcolor": COLOURS["muted"],
}  # fmt: skip
Lines = list[dict[str, Any]]  # of metrics.jsonl


def draw(
    evaluation: Mapping[str, Any], steps: Lines, validations: Lines, manifest: Mapping[str, Any]
) -> dict[str, Markup]:
    """Every plot by name, each a `<figure>`; empty where the run has no figures for it."""
    # Letters that Matplotlib's own font lacks are drawn by the reader's browser.
    with matplotlib.rc_context(STYLE), warnings.catch_warnings(action="ignore", category=UserWarning):
        return {
            "perplexity": _perplexity(evaluation),
            "loss": _loss(steps, validations),
            "learning_rate": _curve("Learning rate", "learning rate", steps, "learning_rate"),
            "gradient": _curve("Gradient norm", "before clipping", steps, "grad_norm"),
            "speed": _curve("Speed", "tokens per second", steps, "tokens_per_second"),
            "splits": _splits(manifest),
            "lengths": _lengths(manifest),
            "fates": _fates(manifest),
        }


def _perplexity(evaluation: Mapping[str, Any]) -> Markup:
    sides = [("base model", evaluation["before"]["perplexity"], "grey")]
    sides += [("fine-tuned", evaluation["after"]["perplexity"], "blue")]
    bars = [(name, value, f"{value:,.2f}", colour) for name, value, colour in sides]
    return _bars("Held-out perplexity (lower is better)", "perplexity", bars)


def _loss(steps: Lines, validations: Lines) -> Markup:
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


def _curve(title: str, unit: str, steps: Lines, key: str) -> Markup:
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


def _splits(manifest: Mapping[str, Any]) -> Markup:
    rows = {name: split["rows"] for name, split in manifest.get("splits", {}).items()}
    return _bars("Split sizes", "rows", [(name, count, f"{count:,}", "blue") for name, count in rows.items()])


def _lengths(manifest: Mapping[str, Any]) -> Markup:
    tokens = {name: split["tokens"] for name, split in manifest.get("splits", {}).items() if split.get("tokens")}
    bars = [(name, t["mean"], f"{t['mean']:,.0f} mean, {t['max']:,} longest", "blue") for name, t in tokens.items()]
    return _bars("Length of a row", "tokens", bars, [t["max"] for t in tokens.values()])


def _fates(manifest: Mapping[str, Any]) -> Markup:
    dropped = sorted(manifest.get("dropped", {}).items(), key=lambda item: -item[1])
    fates = [("kept", manifest.get("rows_out", 0)), ("merged into another", manifest.get("merged", 0))]
    fates += [(f"dropped: {reason}", count) for reason, count in dropped[:REASONS]]
    fates += [(f"dropped: {len(dropped) - REASONS} other reasons", sum(count for _, count in dropped[REASONS:]))]
    bars = [(fate, count, f"{count:,}", "blue" if fate == "kept" else "grey") for fate, count in fates if count]
    return _bars("Where the rows went", "rows", bars)


def _bars(
    title: str, unit: str, bars: Sequence[tuple[str, float, str, str]], most: Sequence[float] | None = None
) -> Markup:
    """Horizontal bars of (name, value, text, colour), name and text above each; `most` extends one, paler."""
    if not bars:
        return Markup("")
    names = ["\n".join(textwrap.wrap(name, 46, max_lines=2, placeholder="…")) for name, *_ in bars]
    axes, place = _axes(0.55 + sum(0.45 + 0.17 * name.count("\n") for name in names)), 0.0
    for number, (name, (_, value, text, colour)) in enumerate(zip(names, bars, strict=True)):
        place += 1 + 0.38 * name.count("\n")
        if most:
            axes.barh(place, most[number], 0.3, color=COLOURS[colour], alpha=0.35, lw=0)
        axes.barh(place, value if math.isfinite(value) else 0, 0.3, color=COLOURS[colour], lw=0)
        axes.text(0, place - 0.24, name, transform=axes.get_yaxis_transform(), color=COLOURS["muted"])
        axes.text(1, place - 0.24, text, transform=axes.get_yaxis_transform(), ha="right", weight="bold")
    axes.set(xlabel=unit, yticks=[], ylim=(place + 0.3, 0.15))
    axes.set_xlim(left=0)
    axes.spines[:].set_visible(False)
    axes.grid(axis="x")
    return _svg(axes, title, ", ".join(f"{name}: {text}" for name, _, text, _ in bars) + f" ({unit})")


def _thin(lines: Lines, key: str) -> tuple[list[tuple[float, float]], int]:
    """At most POINTS (step, value) pairs, each the mean of as many lines as the second result says."""
    points = [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
    size = max(1, math.ceil(len(points) / POINTS))
    groups = [list(zip(*points[i : i + size], strict=True)) for i in range(0, len(points), size)]
    return [(statistics.fmean(steps), statistics.fmean(values)) for steps, values in groups], size


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
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{title.split()[0]}-", svg)  # the plots share a page
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    label = html.escape(f"{title}: {says}")
    return Markup(f'<figure><figcaption>{title}</figcaption><svg role="img" aria-label="{label}" {svg}</figure>')
