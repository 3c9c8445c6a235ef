"""Files that are whole or not there: JSON and JSONL, written beside their place and renamed into it."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]  # of metrics.jsonl


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_json(file: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(file)


def write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    """A JSONL file, whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text("".join(map(to_line, lines)), encoding="utf-8")
    partial.rename(file)


def to_line(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def read_lines(file: Path) -> Lines:
    """The lines of a JSONL file that was written line by line; one that a kill cut is left out."""
    lines = []
    for text in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def sync(path: Path) -> None:
    """Makes what was written to a file, or renamed in a folder, last through a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
