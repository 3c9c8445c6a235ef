"""The files of a source that is a folder or a pattern, as NeMo Curator, `datasets` and Spark leave them.

    SOURCE=corpus/                          every file of its one kind, in its folders too
    SOURCE='corpus/part-*.jsonl.zst'        those that match; `**` stands for any folders

As in Spark, what begins with `_` or `.` is no data (`_SUCCESS`, `._SUCCESS.crc`, `_temporary/`), and neither are empty
files, which stand for partitions without rows.
"""

import glob
import os
from collections import Counter
from pathlib import Path

from core.errors import UserError
from data_prep.read_passages import SUFFIXES as PLAIN_TEXT

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "JSON Lines"),
    **dict.fromkeys((".csv", ".tsv"), "CSV"),
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    **dict.fromkeys(PLAIN_TEXT, "plain text"),
}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what `datasets` writes beside
SPLITS = "dataset_dict.json"


def is_pattern(text: str) -> bool:
    """Whether a text names a folder or a pattern rather than a file."""
    path = Path(text).expanduser()
    return path.is_dir() or (glob.has_magic(text) and not path.exists())


def files_of(text: str) -> tuple[list[Path], int]:
    """The files that a folder or a pattern names, sorted, and how many were left out as they are empty.

    Raises:
        UserError: there is none, or they are of several kinds, or of several splits.
    """
    place = Path(text).expanduser()
    if place.is_dir():
        if (place / SPLITS).is_file():
            splits = sorted(path.name for path in place.iterdir() if path.is_dir())
            raise UserError(
                f"{text} holds the splits {', '.join(splits)}; name one of them: SOURCE={place / splits[0]}"
            )
        inside = _data_files(place)
        found = [path for path in inside if kind_of_file(path)]
        if any(kind_of_file(path) != "plain text" for path in found):  # a README among tables
            found = [path for path in found if kind_of_file(path) != "plain text"]
        what = f"{text} is a folder without a file of rows" + (f", such as {inside[0].name}" if inside else "")
    else:
        matched = [Path(name) for name in glob.glob(str(place), recursive=True)]  # noqa: PTH207  also absolute
        found = [file for path in matched for file in (_data_files(path) if path.is_dir() else [path])]
        found = [path for path in found if not path.name.startswith(("_", "."))]
        what = f"no file matches {text}"
    filled = sorted({path for path in found if path.stat().st_size > 1})  # NeMo Curator leaves one line end
    if not filled:
        raise UserError(
            f"{what if not found else f'{text}: all {len(found)} files are empty'}. Read are CSV, TSV, JSONL, JSON, "
            f"Parquet and Arrow files, and .txt and .md, packed or not"
        )
    kinds = Counter(kind_of_file(path) or path.suffix or "without a suffix" for path in filled)
    if len(kinds) > 1:
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        suffix = "".join(filled[0].suffixes[-2:])
        raise UserError(
            f"{text} holds files of several kinds ({listed}); name those of one, such as '{place}/**/*{suffix}'"
        )
    return filled, len(set(found)) - len(filled)


def _data_files(folder: Path) -> list[Path]:
    """All files in a folder and its folders but for hidden and `_` ones."""
    found = []
    for place, folders, names in os.walk(folder):  # which passes over folders that may not be read
        folders[:] = [name for name in folders if not name.startswith(("_", "."))]
        shown = [name for name in names if not name.startswith(("_", ".")) and name not in ABOUT]
        found += [path for name in shown if os.path.isfile(path := Path(place) / name)]  # noqa: PTH113  never raises
    return sorted(found)


def kind_of_file(path: Path) -> str:
    """What a file holds, by its name; "" for what is no data. Spark's text files have no suffix: `part-00000`."""
    name = Path(path.stem) if path.suffix.lower() in PACKED else path
    if not name.suffix and name.name.startswith("part-"):
        return "JSON Lines"
    return KINDS.get(name.suffix.lower(), "")
