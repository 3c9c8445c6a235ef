"""Durable files: JSON, JSONL, text and whole folders that are complete or absent, also after a kill or a power failure.

Everything is written under a temporary name beside its place (`.<name>.partial`), flushed to disk (fsync) and renamed,
and then the folder that holds the name is flushed. Whatever interrupts this, the file has its old content or its new
one; the next write removes what was left. Two processes must not write the same file at once: callers that may, hold a
lock. Standard library only, since serving uses it too.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import UserError

Lines = list[dict[str, Any]]  # of a JSONL file


def write_whole(file: Path, content: str | bytes) -> None:
    """Replace `file` by `content`; a text is written as UTF-8, its line ends as they are.

    Raises:
        OSError: it cannot be written; `file` is then as it was.
    """
    with writing(file) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(file: Path, value: Any) -> None:
    """Replace `file` by `value` as indented JSON. Raises OSError as `write_whole`."""
    write_whole(file, to_json(value))


def write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace `file` by a JSON object a line. Raises OSError as `write_whole`."""
    with writing(file) as partial, partial.open("w", encoding="utf-8") as out:
        out.writelines(map(to_line, lines))


@contextmanager
def writing(file: Path) -> Iterator[Path]:
    """A path to write to in the `with` block, for writers that want a path; it replaces `file` when the block ends.

        with writing(folder / "model.nemo") as partial:
            model.save_to(str(partial))

    An exception in the block leaves `file` as it was and removes what was written.
    """
    partial = beside(file, "partial")
    partial.unlink(missing_ok=True)  # of a process that was killed; a writer might append to it
    try:
        yield partial
        commit(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill in the `with` block; it replaces `folder`, whose parent exists, when the block ends.

    An exception in the block leaves `folder` as it was and removes what was written.
    """
    restore(folder)
    partial = beside(folder, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        commit(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def commit(partial: Path, target: Path) -> None:
    """Flush `partial`, a file or a folder with all its files, to disk and rename it to `target`, which it replaces.

    A folder cannot be replaced by one rename: the old one stands as `.<name>.old` between two, and `restore` puts it
    back if the process is killed there.
    """
    old, replaces_folder = beside(target, "old"), target.is_dir()
    for path in [*partial.rglob("*"), partial]:
        if not path.is_symlink():
            sync(path)
    if replaces_folder:
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        restore(target)
        raise
    sync(target.parent)
    if replaces_folder:
        shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path) -> None:
    """Put the old `folder` back, where a process was killed while it replaced it."""
    old = beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def beside(path: Path, state: str) -> Path:
    """The hidden temporary name of a file or folder, in the same folder: `.<name>.<state>`."""
    return path.with_name(f".{path.name}.{state}")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that they outlast a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def to_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, whoever wrote it.

    Raises:
        UserError: there is no such file, or it has no JSON object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}). Copy or download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object. Copy or download it again")
    return values


def read_lines(file: Path) -> Lines:
    """The lines of a JSONL file that was written line by line; a last one that was cut by a kill is left out."""
    lines = []
    for text in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
