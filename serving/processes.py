"""A child process of the server: started, watched, killed with all its children, and never left behind."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

LOG_BYTES = 10 << 20
DELAYS = (0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before the next start of a process that keeps dying
STEADY = 2.0  # seconds that a process must have been up for its earlier deaths not to count
COUNTED = 3  # deaths in a row at most, of a process that had answered: a restart must not take more than ten seconds
WORTH_A_LOOK = 0.5  # seconds of silence after which its threads are looked at
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
OUT_OF_MEMORY = ("MemoryError", "can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
_libc = ctypes.CDLL(None)


@dataclass
class ManagedProcess:
    """A process of the server that is restarted whenever it dies or hangs.

    Attributes:
        expendable: the kernel kills it first where the machine runs out of memory.
        is_up: whether it has answered since its last start; `up_at`: when it first did (monotonic clock).
        silence: seconds since its last sign of life, counted only while the supervisor itself was running.
        stillness: the part of `silence` in which it was idle: on a busy machine a process may be silent only because it
            waits for a processor.
        deaths: how many times in a row it has died; `start_at`: when it is started again (monotonic clock).
        ended_for: why the supervisor killed it; "" where it ended by itself.
    """

    name: str
    command: list[str]
    folder: Path  # its working directory
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    expendable: bool = False
    popen: subprocess.Popen[bytes] | None = None
    is_up: bool = False
    up_at: float = 0.0
    silence: float = 0.0
    stillness: float = 0.0
    deaths: int = 0
    start_at: float = 0.0
    ended_for: str = ""
    _kills: int = 0

    def start(self) -> None:
        """
        Raises:
            OSError: the machine has no memory or no file descriptors for it.
        """
        with self._open_log() as log:
            self.popen = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_us(signal.SIGKILL, self.expendable),
            )
        self.is_up, self.silence, self.stillness, self.ended_for = False, 0.0, 0.0, ""
        self._kills = kills_for_memory()

    def _open_log(self) -> IO[bytes]:
        try:
            return self.log.open("ab")
        except OSError:  # no room for another file, or no right to write it
            return Path(os.devnull).open("wb")

    @property
    def is_running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def answered(self) -> None:
        """Record a sign of life."""
        if not self.is_up:
            self.is_up, self.up_at = True, time.monotonic()
        self.silence = self.stillness = 0.0

    def time_passes(self, seconds: float) -> None:
        """Record that `seconds` have passed without a sign of life."""
        self.silence += seconds
        if self.silence < WORTH_A_LOOK or not any(map(wants_to_run, self.family)):
            self.stillness += seconds

    @property
    def family(self) -> list[int]:
        """The ids of the process and of all its descendants."""
        return [self.pid, *(process.pid for process in descendants(self.pid))]

    @property
    def pid(self) -> int:
        return self.popen.pid if self.popen else 0

    def ask_to_end(self) -> None:
        if self.is_running and self.popen:
            self.popen.terminate()

    def kill(self) -> None:
        """Kill it and every process of its session, and wait until they are gone."""
        if self.popen is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()
        with contextlib.suppress(ChildProcessError):
            while True:  # its children have become ours, see `adopt_orphans`
                os.waitpid(-self.pid, 0)

    def reap(self) -> str:
        """Kill what is left of it, schedule its next start, and return why it ended."""
        self.kill()
        steady = self.is_up and time.monotonic() - self.up_at > STEADY
        self.deaths = 1 if steady else min(self.deaths + 1, COUNTED) if self.is_up else self.deaths + 1
        delay = DELAYS[min(self.deaths, len(DELAYS)) - 1]
        reason = self.why_it_ended()
        if delay:
            reason += f" ({self.deaths} times in a row; the next start is in {delay:.0f} s)"
        self.popen, self.is_up, self.start_at = None, False, time.monotonic() + delay
        return reason

    def why_it_ended(self) -> str:
        code, words = self.popen.returncode if self.popen else None, self.last_words()
        if self.ended_for:
            return f"{self.name} was killed: {self.ended_for}"
        by_kernel = code == -signal.SIGKILL and kills_for_memory() > self._kills
        if by_kernel or any(sign in words for sign in OUT_OF_MEMORY):
            return f"{self.name} ran out of memory" + ("" if by_kernel else f": {words}")
        if code is not None and code < 0:
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        return f"{self.name} ended with code {code}: {words}"

    def last_words(self) -> str:
        """The last line of its log that is not empty, at most 300 characters."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - 4000))
                lines = [line.strip() for line in log.read(4000).decode(errors="replace").splitlines()]
        except OSError:
            return ""
        return next((line for line in reversed(lines) if line), "")[:300]

    def shorten_log(self) -> None:
        """Rotate the log at `LOG_BYTES`. It is opened for appending, so its writer goes on at the new end.

        Without room for the copy, what it holds is dropped: that may be what fills the disk.
        """
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            older = self.log.with_suffix(".log.1")
            try:
                shutil.copyfile(self.log, older)
            except OSError:
                older.unlink(missing_ok=True)
            os.truncate(self.log, 0)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, so that `ManagedProcess.kill` leaves no zombies."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def wants_to_run(pid: int) -> bool:
    """Whether one of its threads is running, or waits for a processor or a disk."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            if thread.read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    return False


def is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kills_for_memory() -> int:
    """How many processes the kernel has killed because memory ran out, on this machine or in this container."""
    total = 0
    for file in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")):
        with contextlib.suppress(OSError):
            total += sum(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("oom_kill "))
    return total


def end_with_us(number: int, expendable: bool = False) -> Callable[[], None]:
    """For `preexec_fn`: the child receives signal `number` when this process ends, however it ends."""
    parent = os.getpid()

    def between_fork_and_exec() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # the parent died in between
            os._exit(1)
        if expendable:
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("500")

    return between_fork_and_exec
