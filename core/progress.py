"""A progress bar on stderr for work that takes longer than two seconds; plain lines where that is not a terminal."""

import sys
import time
from types import TracebackType
from typing import Any

PATIENCE = 2.0  # seconds before anything is shown
LINE_EVERY = 15.0  # seconds between lines in a log file


class Progress:
    """A bar that appears if the work takes longer than PATIENCE.

        with Progress("Reading", total=file_size) as progress:
            ...
            progress.at(bytes_read)

    Args:
        label: shown before the bar.
        total: of the work, in any unit.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, max(total, 1)
        self._show_at = time.monotonic() + PATIENCE
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def at(self, done: int) -> None:
        """Report how much of `total` is done. Cheap: it may be called a hundred times a second."""
        now = time.monotonic()
        if now < self._show_at:
            return
        if not sys.stderr.isatty():
            print(f"{self._label}: {min(100 * done // self._total, 100)} %", file=sys.stderr, flush=True)
            self._show_at = now + LINE_EVERY
            return
        if self._bar is None:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(escape(self._label), total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
