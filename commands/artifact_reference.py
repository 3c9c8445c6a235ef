"""docs/artifacts.md, made from the models of core/artifacts.py: every file, its keys, their types and meanings.

python -m commands.artifact_reference
"""

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from core.arguments import Arguments, parse
from core.artifacts import ARTIFACTS, Estimate, Record
from core.errors import run
from core.files import write_whole

DOCS = Path("docs/artifacts.md")
HEADER = """\
# Artifacts

What the stages leave on disk for each other. This page is made from core/artifacts.py by
`python -m commands.artifact_reference`.

Each file, and each line of a JSONL file, is a JSON object with the number of its `format`; one without a number was
written before there were numbers and is of format 1. A file of a format that this version does not know is refused.
An estimate is `[value, low, high]` with the bounds of a 95% interval, `null` where there are none. Keys with a default
may be missing.
"""
NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "any"}


def main(argv: list[str]) -> None:
    parse(Arguments, argv)
    write_whole(DOCS, reference())
    print(f"written: {DOCS}")


def reference() -> str:
    """The page, as Markdown."""
    parts = [HEADER]
    for artifact in ARTIFACTS:
        where = _code(artifact.WHERE)
        parts.append(f"## {artifact.__name__}\n\n{_summary(artifact)}\n\nPlace: {where}.\n\n{_table(artifact)}")
        for record in dict.fromkeys(records(artifact)):
            parts.append(f"### {artifact.__name__}: {record.__name__}\n\n{_summary(record)}\n\n{_table(record)}")
    return "\n".join(parts)


def _summary(record: type[Record]) -> str:
    return " ".join((record.__doc__ or "").split("\n\n")[0].split())


def _code(where: str) -> str:
    """`where`, its paths as code."""
    return re.sub(r"[\w./<>]+[./][\w./<>]+/?|\w+/(?= |$)", r"`\g<0>`", where)


def _table(record: type[Record]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in record.model_fields.items():
        key, kind = field.serialization_alias or name, _type(field.rebuild_annotation())
        default = "" if field.is_required() else f"`{json.dumps(field.default)}`"
        lines.append(f"| `{key}` | {kind} | {default} | {field.description or ''} |")
    return "\n".join(lines) + "\n"


def records(record: type[Record]) -> Iterator[type[Record]]:
    """The records within a record, the outer ones first."""
    found = [inner for field in record.model_fields.values() for inner in _within(field.rebuild_annotation())]
    yield from found
    for inner in found:
        yield from records(inner)


def _within(annotation: Any) -> Iterator[type[Record]]:
    if isinstance(annotation, type) and issubclass(annotation, Record):
        yield annotation
    for argument in get_args(annotation):
        yield from _within(argument)


def _type(annotation: Any) -> str:
    """A type in words, e.g. `list of text`."""
    if annotation == Estimate:
        return "estimate"
    if annotation in NAMES:
        return NAMES[annotation]
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return annotation.__name__
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _type(arguments[0])
    if kind is Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if kind in (types.UnionType, Union):
        return " or ".join(map(_type, arguments))
    if kind is list:
        return f"list of {_type(arguments[0])}"
    if kind is tuple:
        return f"[{', '.join(map(_type, arguments))}]"
    return f"object: {_type(arguments[0])} → {_type(arguments[1])}"  # a mapping


if __name__ == "__main__":
    run(main)
