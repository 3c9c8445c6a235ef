"""A data folder, made by one process at a time and replaced as a whole (see core/files.py); a second process waits.

It is left as it is while its fingerprint, a hash of everything that decides its content, stays the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.artifacts import Manifest
from core.errors import UserError
from core.files import restore, writing_folder

MANIFEST = "manifest.json"


@contextmanager
def building(folder: Path, fingerprint: str) -> Iterator[Path | None]:
    """An empty folder to fill in the `with` block, which becomes `folder` at its end; None if that is up to date.

    Raises:
        UserError: `folder` holds something else than data made here, which must not be replaced.
    """
    folder = folder.resolve()  # where it is a link, what it points to is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        restore(folder)
        if is_current(folder, fingerprint):
            yield None
            return
        if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} was not made by data_prep and is left alone; give another data_dir=FOLDER")
        with writing_folder(folder) as partial:
            yield partial


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
        return manifest.fingerprint == fingerprint and all(
            (folder / f"{name}.jsonl").stat().st_size == split.bytes for name, split in manifest.splits.items()
        )
    except (OSError, UserError):
        return False  # missing, damaged or of another format: made again


def read_manifest(folder: Path) -> Manifest:
    """
    Raises:
        UserError: there is none, or it is damaged or of an unknown format.
    """
    return Manifest.read(folder / MANIFEST)
