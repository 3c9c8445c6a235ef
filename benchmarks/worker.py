"""A system under measurement in a process of its own: peak memory is then true, and packages may differ.

The benchmark writes lines to the process's stdin and reads JSON lines from its stdout; its stderr goes to a log file.
What the lines mean is up to the benchmark (benchmarks/systems.py for training, benchmarks/serve.py for serving).
Only the standard library is imported here, because peers' environments import it too.
"""

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class NotRun(Exception):
    """Why a system is not in the comparison."""


def find_python(package: str, interpreters: Iterable[str], environment: str) -> str:
    """The first of `interpreters` that can import `package`.

    Args:
        interpreters: paths; empty and missing ones are skipped.
        environment: folder of the virtual environment that should have the package, for the message.

    Raises:
        NotRun: none can.
    """
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"
    for python in interpreters:
        if python and Path(python).exists() and not subprocess.run([python, "-c", probe], check=False).returncode:
            return python
    raise NotRun(f"{package} is not installed (looked here and in {environment})")


class TooLong(NotRun):
    """It did not answer in the time that it had."""


class Worker:
    """The process of one system.

    Args:
        command: its arguments; it runs in the repository root.
        log: file for its stderr.
        environment: variables in addition to this process's.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Puts lines of its stdout, and "" at its end, where `receive` can wait for them with a limit of time."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def send(self, line: str) -> None:
        """Write a line to its stdin. If it has ended, `receive` says why."""
        assert self.process.stdin
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def receive(self, seconds: float | None = None) -> Any:
        """The next JSON line.

        Args:
            seconds: how long to wait for it.

        Raises:
            NotRun: the process has ended, or the line is `{"failed": REASON}`.
            TooLong: no line came in that time.
        """
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            raise TooLong(f"did not end within {seconds:,.0f} s") from None
        if not line:
            self.lines.put("")  # it stays at its end
            code = self.process.wait()
            said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            killed = "killed, most likely for want of memory" if code == -signal.SIGKILL else f"ended with code {code}"
            raise NotRun(f"{killed}{': ' + said[-1][:200] if said and code != -signal.SIGKILL else ''}")
        message = json.loads(line)
        if isinstance(message, dict) and "failed" in message:
            raise NotRun(message["failed"])
        return message

    def stop(self) -> None:
        """End the process and what it has started."""
        for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, None)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(seconds)
            except ProcessLookupError:
                self.process.wait()
            except subprocess.TimeoutExpired:
                continue
            return


class Shares:
    """The time of a benchmark in equal shares, of which systems that are out leave what they did not use to the others.

    Args:
        names: of the systems.
        seconds: for all of them.
    """

    def __init__(self, names: Iterable[str], seconds: float) -> None:
        self.used, self.seconds, self.out = dict.fromkeys(names, 0.0), seconds, set[str]()

    def left(self, name: str) -> float:
        """Seconds that `name` may still use; 0 where it has used more."""
        gone = sum(self.used[one] for one in self.out)
        return max(0.0, (self.seconds - gone) / max(1, len(self.used) - len(self.out)) - self.used[name])

    @contextmanager
    def used_by(self, name: str) -> Iterator[float]:
        """Counts the time of its body; gives what is left before."""
        began = time.monotonic()
        try:
            yield self.left(name)
        finally:
            self.used[name] += time.monotonic() - began


def leave_out(
    name: str,
    reason: NotRun,
    has_rounds: bool,
    systems: dict[str, dict[str, Any]],
    running: dict[str, Any],
    shares: Shares,
) -> None:
    """Stop a system, and write into `systems` why; what it has measured stays if `has_rounds` of it can be shown."""
    if isinstance(reason, TooLong) and has_rounds:
        print(f"  {name}: stopped: {reason}", flush=True)
        systems[name]["stopped"] = f" (it {reason})"
    else:
        print(f"  {name}: not run: {reason}", flush=True)
        systems[name] = {"not_run": str(reason)}
    shares.out.add(name)
    if worker := running.pop(name, None):
        worker.stop()
