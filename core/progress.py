"""A progress bar on stderr for work that takes longer than two seconds; plain lines where that is not a terminal."""

import sys
import time
from threading import Event, Thread
from types import TracebackType

PATIENCE = 2.0  # seconds before anything is shown
LINE_EVERY = 15.0  # seconds between lines in a log file
REFRESH = 0.1  # seconds between two looks at what is done


class Progress:
    """A bar with the time left, which appears if the work takes longer than PATIENCE, also where nothing of it is done.

        with Progress("Reading", total=file_size) as progress:
            ...
            progress.at(bytes_read)

    Args:
        label: shown before the bar.
        total: of the work, in any unit; None: how much there is cannot be told, and the seconds so far are shown.
    """

    def __init__(self, label: str, total: int | None) -> None:
        self._label, self._total, self._done = label, None if total is None else max(total, 1), 0
        self._over = Event()
        self._thread = Thread(target=self._show, name=label, daemon=True)

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            import rich.progress  # noqa: F401  here, as the work of this thread may be imports
        self._started = time.monotonic()
        self._thread.start()
        return self

    def at(self, done: int) -> None:
        """Report how much of `total` is done. Cheap: it may be called a hundred times a second."""
        self._done = done

    def advance(self, more: int) -> None:
        """Report that `more` of `total` is done."""
        self._done += more

    def _show(self) -> None:
        if self._over.wait(PATIENCE):
            return
        if sys.stderr.isatty():
            self._show_bar()
            return
        while True:
            print(f"{self._label}: {self._in_words()}", file=sys.stderr, flush=True)
            if self._over.wait(LINE_EVERY):
                return

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress as Bar
        from rich.progress import TimeElapsedColumn

        columns = (*Bar.get_default_columns()[:2], TimeElapsedColumn()) if self._total is None else ()
        # What the work prints meanwhile appears above the bar, but for a stdout that goes elsewhere.
        console = Console(stderr=True)
        with Bar(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
            task = bar.add_task(escape(self._label), total=self._total)
            while not self._over.wait(REFRESH):
                bar.update(task, completed=self._done)

    def _in_words(self) -> str:
        seconds = time.monotonic() - self._started
        if self._total is None:
            return f"{seconds:.0f} s so far"
        words = f"{min(100 * self._done // self._total, 100)} %"
        if 0 < self._done < self._total:
            words += f", {seconds / self._done * (self._total - self._done):.0f} s left"
        return words

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
