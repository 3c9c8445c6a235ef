"""A part of the server as a process that does not outlive it: started, watched, ended with all its children."""

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

import psutil

LOG_BYTES = 10 << 20
DELAYS = (0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before the next start of a part that keeps dying
STEADY = 2.0  # seconds a part must have answered to have its deaths forgotten
COUNTED = 3  # deaths in a row, of one that had answered: it can start, and who waits has been promised ten seconds
WORTH_A_LOOK = 0.5  # seconds of silence
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
OUT_OF_MEMORY = ("MemoryError", "can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
_libc = ctypes.CDLL(None)


@dataclass
class Part:
    """A process of the server, started as often as it must be.

    Attributes:
        is_up: whether it has answered since its last start; `up_at`: when it first did, on the monotonic clock.
        silence: seconds since its last sign of life, of those that the supervisor itself has been awake.
        stillness: of them, those in which it did nothing and did not want to: on a machine that is busy, a process may
            be silent only because it has to wait for a processor.
        deaths: how often it has died in a row; `start_at`: when it is started again.
    """

    name: str
    command: list[str]
    folder: Path  # its working directory
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    expendable: bool = False  # the first to go where the machine's memory ends
    process: subprocess.Popen | None = None
    is_up: bool = False
    up_at: float = 0.0
    silence: float = 0.0
    stillness: float = 0.0
    deaths: int = 0
    start_at: float = 0.0
    ended_for: str = ""
    _kills: int = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
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

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def answered(self) -> None:
        """It has shown that it lives."""
        if not self.is_up:
            self.is_up, self.up_at = True, time.monotonic()
        self.silence = self.stillness = 0.0

    def time_passes(self, seconds: float) -> None:
        """Without a sign of life, of which `answered` would tell."""
        self.silence += seconds
        if self.silence < WORTH_A_LOOK or not any(map(wants_to_run, self.family)):
            self.stillness += seconds

    @property
    def family(self) -> list[int]:
        """Its process and that process's children."""
        return [self.pid, *(process.pid for process in descendants(self.pid))]

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def ask_to_end(self) -> None:
        if self.is_running and self.process:
            self.process.terminate()

    def kill(self) -> None:
        """End it and every process of its session at once, and wait until they are gone."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(ChildProcessError):
            while True:  # its children are ours now, see `adopt_orphans`
                os.waitpid(-self.pid, 0)

    def bury(self) -> str:
        """Kill what is left of it, set when it starts again, and say why it ended."""
        self.kill()
        steady = self.is_up and time.monotonic() - self.up_at > STEADY
        self.deaths = 1 if steady else min(self.deaths + 1, COUNTED) if self.is_up else self.deaths + 1
        delay = DELAYS[min(self.deaths, len(DELAYS)) - 1]
        reason = self.why_it_ended()
        if delay:
            reason += f" ({self.deaths} times in a row; the next start is in {delay:.0f} s)"
        self.process, self.is_up, self.start_at = None, False, time.monotonic() + delay
        return reason

    def why_it_ended(self) -> str:
        code, words = self.process.returncode if self.process else None, self.last_words()
        if self.ended_for:
            return f"{self.name} was ended: {self.ended_for}"
        by_kernel = code == -signal.SIGKILL and kills_for_memory() > self._kills
        if by_kernel or any(sign in words for sign in OUT_OF_MEMORY):
            return f"{self.name} ended for want of memory" + ("" if by_kernel else f": {words}")
        if code is not None and code < 0:
            return f"{self.name} was ended by {signal.Signals(-code).name}"
        return f"{self.name} ended with code {code}: {words}"

    def last_words(self) -> str:
        """The last line of its log that says something."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 4000))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")[:300]

    def shorten_log(self) -> None:
        """Keep `LOG_BYTES` of it, twice. Its writer appends, so a file that is cut is written on from its new end."""
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
            os.truncate(self.log, 0)


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans, so that `Part.kill` leaves no zombies."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def wants_to_run(pid: int) -> bool:
    """Whether a thread of it runs, waits for a processor or for a disk."""
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
    """How many processes the kernel has killed for want of memory, on this machine or in this container."""
    total = 0
    for file in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")):
        with contextlib.suppress(OSError):
            total += sum(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("oom_kill "))
    return total


def end_with_us(number: int, expendable: bool = False) -> Callable[[], None]:
    """For `preexec_fn`: the process gets signal `number` when this one ends, whatever way that is."""
    parent = os.getpid()

    def between_fork_and_exec() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died in between
            os._exit(1)
        if expendable:
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("500")

    return between_fork_and_exec
