"""A data folder appears whole or not at all: filled beside its place, flushed to disk, then renamed into it.

One process at a time works on a folder; a second one waits and finds it ready. What a killed process leaves is a
hidden `.partial` folder that the next one clears, or, in the instant between two renames, the good old folder as
`.old`, which the next one puts back.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import sync

MANIFEST = "manifest.json"


@contextmanager
def building(folder: Path, fingerprint: str) -> Iterator[Path | None]:
    """An empty folder to fill in the `with` block, which becomes `folder` at its end; None if that is up to date.

    Raises:
        UserError: `folder` holds something else than data made here, which must not be replaced.
    """
    folder = folder.resolve()  # where it is a link, what it points to is replaced
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if old.exists() and not folder.exists():
            old.rename(folder)
        if is_current(folder, fingerprint):
            yield None
            return
        if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} was not made by data_prep and is left alone; give another data_dir=FOLDER")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for path in [*partial.iterdir(), partial]:
                sync(path)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"Waiting for another process that is preparing {folder}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_current(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` was made from the same things and its split files are as long as they were then."""
    try:
        manifest = read_manifest(folder)
        return manifest["fingerprint"] == fingerprint and all(
            (folder / f"{name}.jsonl").stat().st_size == split["bytes"] for name, split in manifest["splits"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not there, or not ours to understand: made anew


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest
