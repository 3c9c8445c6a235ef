"""The two pictures of docs/architecture.md: the path of a row and the path of a request. `make docs` draws them."""

from dataclasses import dataclass
from pathlib import Path

from core.files import write_whole

DOCS = Path(__file__).resolve().parents[1] / "docs"
BOX, GAP, MARGIN = (196, 74), 44, 16  # pixels
STAGE, ARTIFACT = "#dcefe7", "#f1f3f5"  # what computes, and what lies on disk or travels


@dataclass(frozen=True)
class Box:
    """A step: `title` in bold, `lines` below it; `label` stands on the arrow that leads to it."""

    title: str
    lines: tuple[str, str]
    color: str = STAGE
    label: str = ""


ROW = [
    [
        Box("table", ("CSV, TSV, JSONL,", "Parquet, hf:owner/name"), ARTIFACT),
        Box("data_prep/", ("repair, filter, merge,", "word, split")),
        Box("data/<task>/", ("training, validation,", "test.jsonl, manifest"), ARTIFACT),
        Box("training/batches", ("tokenize; only the", "response is a target")),
    ],
    [
        Box("training/packing", ("rows end to end, shared", "prefix computed once")),
        Box("training/fit", ("frozen Gemma + LoRA:", "NeMo, Lightning")),
        Box("runs/<task>/<run>/", ("<task>.nemo, metrics,", "checkpoints, report"), ARTIFACT),
        Box("evaluation/", ("base and fine-tuned:", "metrics, intervals")),
    ],
    [
        Box("converters/", ("stream, write, read", "again, prove")),
        Box("exports/<task>/", ("adapter, merged, gguf,", "nemo…, conversion.json"), ARTIFACT),
        Box("serving/", ("Triton, engine,", "gateway, website")),
    ],
]
REQUEST = [
    [
        Box("client", ("writes the prompt of", "the task's adapter"), ARTIFACT),
        Box("gateway", ("OpenAI's protocol to", "Triton's"), label=":9000"),
        Box("Triton", ("gRPC :8001", "HTTP :8000")),
        Box("triton_model.py", ("thin: checks, forwards,", "streams back")),
    ],
    [
        Box("engine/scheduler", ("joins and leaves the", "batch at every token"), label="socket"),
        Box("engine/gemma", ("one base, an adapter", "for each request")),
        Box("kernels.c", ("AMX, AVX-512, AVX2", "or NEON")),
        Box("answer", ("tokens back the same", "way, one by one"), ARTIFACT),
    ],
]


def write_diagrams() -> None:
    write_whole(DOCS / "path-of-a-row.svg", svg("The path of a row", ROW))
    write_whole(DOCS / "path-of-a-request.svg", svg("The path of a request", REQUEST))


def svg(title: str, rows: list[list[Box]]) -> str:
    """Boxes from left to right, row below row, each joined to the next by an arrow."""
    (width, height), step = BOX, BOX[0] + GAP
    columns = max(map(len, rows))
    size = columns * step - GAP + 2 * MARGIN, len(rows) * (height + GAP) - GAP + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" '
        f'font-size="14" role="img"><title>{title}</title>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker></defs>',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
    ]
    for number, row in enumerate(rows):
        top = MARGIN + number * (height + GAP)
        for place, box in enumerate(row):
            left = MARGIN + place * step
            parts += _box(box, left, top)
            middle = top + height / 2
            if place:
                parts.append(_arrow(f"M{left - GAP + 3} {middle} H{left - 3}"))
                x, y = left - GAP / 2, middle - 8
            elif number:  # from the end of the row above to the beginning of this one
                last = MARGIN + (len(rows[number - 1]) - 1) * step + width / 2
                between = top - GAP / 2
                parts.append(_arrow(f"M{last} {top - GAP + 3} V{between} H{left + width / 2} V{top - 3}"))
                x, y = left + width / 2 + 34, top - GAP / 2 + 16
            if box.label:
                parts.append(
                    f'<text x="{x}" y="{y}" font-size="12" fill="#555" text-anchor="middle">{box.label}</text>'
                )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(box: Box, left: int, top: int) -> list[str]:
    (width, height), middle = BOX, left + BOX[0] / 2
    texts = [(box.title, 22, ' font-weight="bold"'), (box.lines[0], 43, ""), (box.lines[1], 61, "")]
    return [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="8" fill="{box.color}" stroke="#888"/>',
        *(
            f'<text x="{middle}" y="{top + down}" text-anchor="middle"{weight}>{_escaped(text)}</text>'
            for text, down, weight in texts
        ),
    ]


def _arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="#555" stroke-width="1.5" marker-end="url(#tip)"/>'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
