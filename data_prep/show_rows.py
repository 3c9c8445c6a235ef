"""Shows what a user should see before training: the counts of a data folder, and rows with their targets marked."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.artifacts import Alike, Manifest, Split
from core.prompt import EOS, Prompt
from data_prep.data_folder import read_manifest
from data_prep.row_store import Drop

EXAMPLES = 2
BOS = "<bos>"  # of every Gemma, as text
LINES = 14  # shown of one piece of a row; a longer one is cut in the middle


def show(folder: Path, prompt: Prompt, examples: int) -> None:
    """Print the counts of `folder`'s manifest and its first `examples` training rows.

    Target text (what the loss is computed on) has a bar at its left, and colour in a terminal. Training sees the same
    pieces (`Prompt.samples`): BOS first, and an end token after each target piece.
    """
    console = plain_console()
    manifest = read_manifest(folder)
    source = manifest.source
    at = f" at {source.revision[:12]}" if source.revision else ""
    console.print(f"{folder}: {manifest.rows_in:,} rows in, {manifest.rows_out:,} out, from {source.name}{at}\n")
    for note in source.notes:
        console.print(f"{source.name}: {note}", soft_wrap=True)
    if source.unused:
        console.print(f"Columns not used: {', '.join(source.unused)}", soft_wrap=True)
    if source.notes or source.unused:
        console.print()
    console.print(_splits(manifest.splits))
    for count, what in _left_out(folder, manifest):
        console.print(f"{count:>8,}  {what}" if what else "", soft_wrap=True)
    with (folder / "training.jsonl").open(encoding="utf-8") as file:
        for number, line in enumerate(islice(file, examples), 1):
            row = json.loads(line)
            of = f" (row {row['row']} of the source)" if "row" in row else ""
            console.print(f"\nExample {number} of {manifest.splits['training'].rows:,}{of}")
            for pieces in prompt.samples(row):
                _show_sample(console, pieces, prompt)
    if examples:
        console.print(f"\n{_mark(console)} is what the model learns to say; it is given the rest.", style="dim")


def plain_console() -> Console:
    """A console that does not highlight; 120 columns wide without a terminal, as a log file has no width."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    return console


def _splits(splits: dict[str, Split]) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 3), header_style="bold")
    table.add_column("split")
    for title in ("rows", *(("tokens of a row", "longest", "learned") if splits["training"].tokens else ())):
        table.add_column(title, justify="right")
    for name, split in splits.items():
        cells = [name, f"{split.rows:,}"]
        if tokens := split.tokens:
            share = (tokens.learned or 0) / max(tokens.total or 0, 1)
            cells += [f"{tokens.mean:,.0f}", f"{tokens.max:,}", f"{share:.0%}"]
        table.add_row(*cells)
    return table


def _left_out(folder: Path, manifest: Manifest) -> Iterator[tuple[int, str]]:
    """`(count, what)` of rows that were changed or left out, after an empty line."""
    alike = list(_alike(manifest.alike))
    if manifest.repaired or manifest.merged or manifest.dropped or alike:
        yield 0, ""
    if manifest.repaired:
        yield manifest.repaired, "cells repaired (encoding, quotes, control characters)"
    yield from alike
    yield from ((count, note) for note, count in manifest.notes.items() if count)
    if dropped := manifest.dropped:
        yield sum(dropped.values()), f"rows dropped, listed in {folder / 'dropped.jsonl'}:"
        first = _first_details(folder)
        for reason, count in dropped.items():
            yield count, f"  {reason}" + (f", such as {first[reason]}" if reason in first else "")


def _alike(alike: Alike | None) -> Iterator[tuple[int, str]]:
    if not alike:
        return
    for count, what in (
        (alike.repeats, "rows merged into an earlier one that says the same"),
        (alike.joined, "rows joined to an earlier one of their key, with their meanings"),
        (alike.meanings, "rows kept beside an earlier one of their key, with another meaning"),
        (alike.variants, "rows kept beside an earlier one of their key and meaning, with other cells or wording"),
        (alike.grouped_rows, f"rows in {alike.groups:,} groups of one key or near-duplicates; each is in one split"),
        (alike.formula_rows or 0, "rows of one formula, told apart by the words that most of them do not share"),
    ):
        if count:
            yield count, what


def _first_details(folder: Path) -> dict[str, str]:
    """What is said in detail of the first row that was dropped for a reason, by reason."""
    found: dict[str, str] = {}
    with (folder / "dropped.jsonl").open(encoding="utf-8") as file:
        for line in file:
            drop = Drop(**json.loads(line))
            if drop.detail and drop.reason not in found:
                found[drop.reason] = drop.in_words()
    return found


def _mark(console: Console) -> str:
    return "▌" if console.encoding.startswith("utf") else ">"


def _show_sample(console: Console, pieces: list[tuple[str, bool]], prompt: Prompt) -> None:
    end = prompt.template.partition("{response}")[2] or EOS
    column = 0  # at which the next piece begins
    for number, (text, learned) in enumerate(pieces):
        text = text if number else BOS + text
        if column and text.startswith("\n"):
            text, column = text[1:], 0
        style = "green" if learned else "dim"
        # A piece that begins in the middle of a line is indented to where the piece before it ended.
        shown = Text(" " * column) + Text(text, style=style)
        if learned:
            shown.append(end, style="bold green")
        lines = list(shown.wrap(console, console.width - 4, tab_size=4))
        column = min(len(lines[-1]), console.width // 2)
        if not column:
            lines.pop()  # the piece ends in a line break, after which the next one begins
        if len(lines) > LINES:
            hidden = len(lines) - LINES + 1
            lines[LINES // 2 : LINES // 2 + hidden] = [Text(f"... {hidden} more lines", style="italic")]
        for line in lines:
            line.rstrip()
            console.print(Text.assemble((f"  {_mark(console)} " if learned else "    ", "bold green"), line))
