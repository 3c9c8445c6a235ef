"""Starts trainings without their seconds of imports: a process imports once, and each training is a fork of it.

python tests/launcher.py      takes orders from the socket that is its standard input: a message of {"words", "said",
                              "environment", "die_in_write", "largest_file"} with the handle of a pipe, which gets the
                              process id and, when that has ended, its exit code (or minus the signal)
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# One thread: a tiny model gains nothing from more, and waits for them on a busy machine. Vector units alone: in one of
# some hundred runs on virtual machines with AMX, a result differed by one rounding from the run it was compared with.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


class Launcher:
    """The process that trainings are forks of; leaving the context ends it."""

    def __enter__(self) -> "Launcher":
        self.orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "tests/launcher.py"]
            self.process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=theirs)
        return self

    def __exit__(self, *_: object) -> None:
        self.orders.close()
        self.process.wait()

    def start(self, words: list[str], folder: Path, **fate: Any) -> "Training":
        """`python -m commands.train` with `words`; what it says comes into `folder`. `fate`: see `child`."""
        folder.mkdir(parents=True, exist_ok=True)
        said = folder / "said"
        said.write_text("")
        answers, theirs = os.pipe()
        order = {"words": words, "said": str(said), **fate}
        socket.send_fds(self.orders, [json.dumps(order).encode()], [theirs])
        os.close(theirs)
        return Training(answers, said)


class Training:
    """A training in a process of its own."""

    def __init__(self, answers: int, said_file: Path) -> None:
        self.said_file = said_file
        self.answers = os.fdopen(answers)
        self.pid = int(self.answers.readline())

    def wait_until(self, happened: Callable[[], object]) -> None:
        """Until something has happened, or it has ended."""
        while Path(f"/proc/{self.pid}").exists() and not happened():
            time.sleep(0.003)

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it ended before
            os.kill(self.pid, number)

    def end(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        with self.answers:
            return int(self.answers.readline())

    @property
    def said(self) -> str:
        return self.said_file.read_text()


# --- in the process that forks ------------------------------------------------------------------------------------


def take_orders(orders: socket.socket) -> None:
    while True:
        order, (*handles,), *_ = socket.recv_fds(orders, 1 << 20, 1)
        with suppress(ChildProcessError):  # those whose training has ended
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not order:
            return
        if not os.fork():
            watch(order, handles[0])
        os.close(handles[0])


def watch(order: bytes, answers: int) -> None:
    """Start a training, answer its process id, and how it ended."""
    pid = os.fork()
    if not pid:
        os.close(answers)
        os._exit(child(**json.loads(order)))
    os.write(answers, f"{pid}\n".encode())
    os.write(answers, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def import_everything() -> None:
    from core.machine import loading, quiet_libraries

    with loading():
        quiet_libraries()
        import transformers.models.gemma3.modeling_gemma3  # noqa: F401

        import commands.train  # noqa: F401
        import training.fit  # noqa: F401


def child(
    words: list[str],
    said: str,
    environment: dict[str, str] | None = None,
    die_in_write: str = "",
    largest_file: int = 0,
) -> int:
    """A training; `die_in_write` ends it by SIGKILL, see `die_at`; no file may be larger than `largest_file` bytes."""
    from commands.train import main
    from core.errors import run

    os.environ.update(environment or {})
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore
    if die_in_write:
        die_at(die_in_write)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["commands.train", *words]
    try:
        run(main)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 1


def die_at(where: str) -> None:
    """SIGKILL inside the second checkpoint write: half of its bytes written, all but not synced, or not yet renamed."""
    from training.checkpoints import SafeCheckpointIO

    save, writes = SafeCheckpointIO.save_checkpoint, []

    def dying(self: SafeCheckpointIO, checkpoint: dict[str, object], path: Path, storage_options: object) -> None:
        writes.append(path)
        if len(writes) < 2:
            return save(self, checkpoint, path, storage_options)
        fsync = os.fsync
        if where == "half":
            os.fsync = lambda handle: (os.ftruncate(handle, os.fstat(handle).st_size // 2), fsync(handle), die())  # type: ignore
        elif where == "unsynced":
            os.fsync = lambda handle: die()  # type: ignore
        save(self, checkpoint, path, storage_options)
        die()  # written and synced, but under its other name

    SafeCheckpointIO.save_checkpoint = dying  # type: ignore


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import_everything()
    take_orders(socket.socket(fileno=0))
