"""Durable files: whatever stops a write, the old or the new content is there, whole, and the next write succeeds.

Processes write for real. A library between them and the C library (tests/faults.c) kills them before each change to
the folder in turn, or in the middle of a write, or lets the disk be full from there on.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

import core.files
from core.files import commit, restore, write_json, write_lines, write_whole, writing, writing_folder

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_faults = pytest.mark.skipif(
    not sys.platform.startswith("linux") or COMPILER is None, reason="faults are injected on Linux, by a C library"
)
SIZE = 20_000  # bytes of a content: more than one buffer

# What a process does to `target`, with `text` as content.
WRITERS = {
    "write_whole": "write_whole(target, text)",
    "write_json": "write_json(target, {'text': text})",
    "write_lines": "write_lines(target, [{'text': part} for part in (text, text)])",
    "writing": "\nwith writing(target) as partial:\n    partial.write_text(text)",
    "writing_folder": """
with writing_folder(target) as partial:
    (partial / 'inner').mkdir()
    (partial / 'one.txt').write_text(text)
    (partial / 'inner' / 'two.txt').write_text(text)""",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    command = [str(COMPILER), "-shared", "-fPIC", "-O1", "-o", str(library), str(ROOT / "tests/faults.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


def write(writer: str, target: Path, letter: str) -> None:
    """Fill `target` with `letter`, undisturbed."""
    exec(WRITERS[writer], {**vars(core.files), "target": target, "text": letter * SIZE})


def write_in_a_process(
    writer: str, target: Path, letter: str, faults: Path, mode: str = "kill", at: int = 0
) -> subprocess.CompletedProcess[str]:
    """`write` in a process that the `at`-th change to the folder stops; it ends with the number of an OSError."""
    code = f"""
import sys
from pathlib import Path
from core.files import *
target, text = Path(sys.argv[1]), sys.argv[2] * {SIZE}
try:
    {WRITERS[writer].replace(chr(10), chr(10) + "    ")}
except OSError as error:
    sys.exit(error.errno)
"""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(faults),
        "FAULT_DIR": str(target.parent),
        "FAULT_AT": str(at),
        "FAULT_MODE": mode,
        "FAULT_LOG": str(target.parent.parent / "changes.log"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-S", "-c", code, str(target), letter]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)


def changes(folder: Path) -> list[tuple[str, str]]:
    """What the last processes changed in `folder`: the kind of a change and the file's path within it."""
    log = folder.parent / "changes.log"
    lines = [line.partition(" ") for line in log.read_text().splitlines()]
    log.unlink()
    return [(what, os.path.relpath(path, folder)) for what, _, path in lines]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def content(target: Path) -> dict[str, bytes]:
    """Every file of `target`, a file or a folder, by its path."""
    files = [target] if target.is_file() else sorted(target.rglob("*"))
    return {str(file.relative_to(target.parent)): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path.resolve() / "folder"
    folder.mkdir()
    return folder


@pytest.mark.slow
@needs_faults
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mode", ["kill", "half", "full"])
def test_a_write_stopped_at_any_step_leaves_the_old_or_the_new_content(
    writer: str, mode: str, faults: Path, folder: Path
) -> None:
    target, contents = folder / "target", {}
    for letter in "no":
        write(writer, target, letter)
        contents[letter] = content(target)
    assert contents["n"] != contents["o"]
    found = []
    for at in count(1):
        write(writer, target, "o")  # also after what the last one left
        assert content(target) == contents["o"] and names(folder) == ["target"]
        done = write_in_a_process(writer, target, "n", faults, mode, at)
        assert done.returncode in (0, errno.ENOSPC if mode == "full" else -signal.SIGKILL), done.stderr
        if mode == "full":
            assert ".target.partial" not in names(folder)  # what was begun takes up no room
        restore(target)  # what the next write of a folder begins with
        found.append(next(letter for letter in "no" if content(target) == contents[letter]))
        if len(changes(folder)) < at:
            break
    assert len(found) > 5  # open, write, flush, rename, flush of the folder, and one that nothing stopped
    assert found == sorted(found, reverse=True) and set(found) == {"o", "n"}  # once new, it is not old again


@needs_faults
@pytest.mark.parametrize("writer", WRITERS)
def test_content_is_flushed_before_its_rename_and_the_folder_after(writer: str, faults: Path, folder: Path) -> None:
    """Else a power failure may leave an empty file under the final name, or the old name for new content."""
    write(writer, folder / "target", "o")
    write_in_a_process(writer, folder / "target", "n", faults)
    made = changes(folder)
    renamed = made.index(("rename", "target"))
    opened = {path for what, path in made if what in ("open", "mkdir")}
    assert opened
    for path in opened:
        filled = max(place for place, it in enumerate(made[:renamed]) if it[0] != "fsync" and it[1] == path)
        assert filled < made.index(("fsync", path)) < renamed
    assert ("fsync", ".") in made[renamed:]
    assert len([it for it in made if it[0] == "fsync"]) == len(opened) + 1  # each once


def test_an_error_while_writing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_whole(file, "old")
    with writing_folder(folder) as partial:
        write_whole(partial / "file", "old")
    with pytest.raises(RuntimeError), writing(file) as partial:
        partial.write_text("new")
        raise RuntimeError
    with pytest.raises(RuntimeError), writing_folder(folder) as partial:
        (partial / "file").write_text("new")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(file, object())
    with pytest.raises(TypeError):
        write_lines(file, [{"a": 1}, {"b": object()}])
    assert content(file) == {"file": b"old"} and content(folder) == {"folder/file": b"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path: Path) -> None:
    old, partial = tmp_path / "old", tmp_path / "partial"
    for folder in (old, partial):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == partial:
            raise OSError(errno.EIO, "cannot be renamed")
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="cannot be renamed"):
            commit(partial, old)
    assert (old / "file").read_text() == "old"


def test_texts_are_written_as_utf_8_with_their_own_line_ends(tmp_path: Path) -> None:
    write_whole(tmp_path / "text", "ä\r\nb\n")
    write_lines(tmp_path / "lines", [{"text": "ä"}])
    assert (tmp_path / "text").read_bytes() == "ä\r\nb\n".encode()
    assert (tmp_path / "lines").read_bytes() == '{"text": "ä"}\n'.encode()
