"""What a benchmark of training found: a table in the terminal, a section of docs/benchmarks.md, docs/benchmarks.png."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCES = ("hf-fp32", "hf-bf16-autocast")
PLOT = Path("docs/benchmarks.png")
OURS, OTHERS = "#2a7f62", "#9aa5b1"


def header(result: dict[str, Any]) -> list[str]:
    fraction = "MFU" if result["ceiling"]["gpu_peak"] else "of the roofline"
    ratios = [f"× {name.replace('-autocast', ' autocast')}" for name in REFERENCES]
    return [
        "system",
        "tokens/s",
        "response tokens/s",
        *ratios,
        fraction,
        "peak memory, GiB",
        f"× {REFERENCES[0]}'s memory",
        "held-out loss",
    ]


def lines(result: dict[str, Any]) -> list[list[str]]:
    """One row per system, with the cells that `header` names; of a system that was not run, its name and the reason."""
    found = []
    for name, system in result["systems"].items():
        if "not_run" in system:
            found.append([name, f"not run: {system['not_run']}"])
            continue
        memory = result["systems"].get(REFERENCES[0], {}).get("peak_gib")
        found.append(
            [
                name,
                f"{system['tokens_per_second']:,.0f}",
                f"{system['learned_per_second']:,.0f}",
                *(_times(speedup(result, name, reference)) for reference in REFERENCES),
                f"{used_fraction(result, name):.1%}",
                _digits(system.get("peak_gib"), 2),
                _times(system["peak_gib"] / memory if memory and "peak_gib" in system else None),
                _digits(system.get("held_out_loss"), 4),
            ]
        )
    return found


def _digits(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def speedup(result: dict[str, Any], name: str, reference: str) -> float | None:
    """Median over rounds of the ratio of tokens per second; a round of both was at nearly the same time.

    Where one was stopped early, over the rounds that both have.
    """
    rounds = [result["systems"].get(one, {}).get("rounds") for one in (name, reference)]
    if not all(rounds):
        return None
    rates = [[one["tokens"] / one["seconds"] for one in system] for system in rounds]
    return statistics.median(a / b for a, b in zip(*rates, strict=False))


def used_fraction(result: dict[str, Any], name: str) -> float:
    """The speed as a fraction of the GPU's peak (MFU), else of this machine's roofline in its faster dtype."""
    speed, tokens = result["systems"][name]["tokens_per_second"], result["data"]["tokens"]
    if peak := result["ceiling"]["gpu_peak"]:
        return float(speed * result["flops"]["total"] / tokens / peak)
    return float(speed * min(result["seconds_at_ceiling"].values()) / tokens)


def _times(ratio: float | None) -> str:
    return f"{ratio:.2f}" if ratio else ""


def facts(result: dict[str, Any]) -> list[str]:
    """Sentences on what was measured, and on the roofline."""
    data, settings, flops, rates = (result[key] for key in ("data", "settings", "flops", "ceiling"))
    samples = (
        f"samples of {data['length']} tokens" if data["length"] else f"samples of at most {data['longest']} tokens"
    )
    best = result["seconds_at_ceiling"]
    tera = {dtype: {part: rate / 1e12 for part, rate in rates[dtype].items()} for dtype in best}
    least = "; ".join(
        f"{dtype} {tera[dtype]['layers']:.2f} TFLOP/s in the layers' shapes and {tera[dtype]['output']:.2f} in the "
        f"output layer's: {best[dtype]:.2f} s, {data['tokens'] / best[dtype]:,.0f} tokens/s"
        for dtype in best
    )
    if "bfloat16" not in best:
        least += "; bfloat16 is emulated, and slower"
    expected = result.get("memory_expected_gib")  # not in what was measured before November 2026
    peak = f" The GPU's peak is {rates['gpu_peak'] / 1e12:,.0f} TFLOP/s." if rates["gpu_peak"] else ""
    return [
        f"{data['source']}: {data['rows']} {samples}, {data['tokens']:,} tokens, of which {data['learned']:,} are "
        f"target tokens. LoRA rank {settings['lora']['r']}, {settings['rows_per_step']} samples per step; "
        f"micro-batches of peers have {settings['peer_rows_at_once']}.",
        f"These samples need {flops['total'] / 1e12:.2f} TFLOP ({flops['layers'] / flops['total']:.0%} frozen layers, "
        f"{flops['adapters'] / flops['total']:.0%} adapters, {flops['attention'] / flops['total']:.0%} attention, "
        f"{flops['output'] / flops['total']:.0%} output layer). Roofline, matrix products alone: {least}.{peak}",
        f"Held-out loss before training: {result['held_out_loss_before']:.4f}, on {data['held_out_rows']} samples.",
        *([f"This project's memory estimate: {expected:.2f} GiB."] if expected else []),
        *left_out(result),
    ]


def left_out(result: dict[str, Any]) -> list[str]:
    """A sentence on what the time limit or an interruption cut off, if it did."""
    return [f"Left out: {'; '.join(result['left_out'])}."] if result.get("left_out") else []


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['model']} on {result['machine']}")
    for number, title in enumerate(header(result)):
        table.add_column(title, justify="right" if number else "left", no_wrap=not number)
    unable = []
    for cells in lines(result):
        if len(cells) == 2:
            unable.append(": ".join(cells))
        else:
            table.add_row(*cells)
    console = Console()
    console.width = max(console.width, 120)  # a wide table in a log file rather than a wrapped one
    console.print(table)
    for line in [*unable, *facts(result)]:
        console.print(line, markup=False, highlight=False)


def section(result: dict[str, Any]) -> list[str]:
    """The lines of a result's section in docs/benchmarks.md."""
    titles, columns = header(result), len(header(result))
    return [
        f"## {_title(result)}",
        "",
        f"`{result['command']}`",
        "",
        *(f"{fact}\n" for fact in facts(result)),
        f"| {' | '.join(titles)} |",
        f"|{'---|' * columns}",
        *(f"| {' | '.join(cells)} {'| ' * (columns - len(cells))}|" for cells in lines(result)),
        "",
        _made_with(result),
        "",
    ]


def _title(result: dict[str, Any]) -> str:
    length = f", samples of {result['data']['length']}" if result["data"]["length"] else ""
    return f"{result['model']}, {result['data']['source']}{length}, {result['machine']}"


def _made_with(result: dict[str, Any]) -> str:
    systems = "; ".join(
        f"{name}: {', '.join(f'{package} {number}' for package, number in packages.items())}"
        for name, packages in result["versions"].items()
        if name in result["systems"]
    )
    return f"{result['finished'][:10]}, commit {result['environment']['commit'][:12]}. Versions: {systems}."


def plot(found: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(len(found), 1, figsize=(8, 2.6 * len(found)), squeeze=False)
    for axes, result in zip(all_axes[:, 0], found, strict=True):
        speeds = {name: one["tokens_per_second"] for name, one in result["systems"].items() if "rounds" in one}
        names = sorted(speeds, key=speeds.__getitem__)
        colors = [OURS if name == "ours" else OTHERS for name in names]
        axes.bar_label(axes.barh(names, [speeds[name] for name in names], color=colors), fmt="{:,.0f}", padding=3)
        axes.set_title(_title(result), fontsize=9, loc="left")
        axes.set_xlabel("tokens/s", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, PLOT)


def save(figure: "Figure", file: Path) -> None:
    """As PNG; the file is replaced when it is complete."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    with writing(file) as partial:
        figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)


def serving_table(result: dict[str, Any]) -> list[str]:
    """Markdown of a result of benchmarks/serve.py: what was measured, and a line for each system."""
    streams = result["streams"]
    many = 8 if 8 in streams else streams[-1]
    titles = [
        "system",
        *(f"tokens/s, {n} at once" for n in streams),
        f"first token p50, {many} at once",
        f"next token p50 / p99, {many} at once",
    ]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, system in result["systems"].items():
        if "not_run" in system:
            lines.append(f"| {name} | not run: {system['not_run']} {'| ' * (len(titles) - 2)}|")
            continue
        found = system["streams"]
        rates = [found[str(n)]["tokens_per_second"] if str(n) in found else None for n in streams]
        cells = [name, *("" if rate is None else f"{rate:,.{0 if rate >= 10 else 1}f}" for rate in rates)]
        if one := found.get(str(many)):
            cells += [
                f"{one['ttft_p50'] * 1e3:,.0f} ms",
                f"{one['gap_p50'] * 1e3:,.0f} / {one['gap_p99'] * 1e3:,.0f} ms",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = "; ".join(
        f"{name}: {', '.join(f'{package} {number}' for package, number in system['versions'].items())}"
        for name, system in result["systems"].items()
        if system.get("versions")
    )
    about = (
        f"{result['model']} on {result['machine']}, {result['tokens']} greedy tokens an answer, an adapter and its "
        f"prompt, medians of {result['rounds']} rounds."
    )
    made = f"{result['finished'][:10]}, `{result['command']}`. Versions: {versions}."
    return [about, "", *lines, "", *(f"{line}\n" for line in left_out(result)), made]
