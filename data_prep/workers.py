"""Processes that share work on a large source, one a core.

A worker ends with the process that started it, however that ended: one that went on would write to files that the next
command is writing.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from core.errors import UserError
from core.machine import cores
from core.progress import Progress

LOOK = 0.5  # seconds between two looks at what the workers have done
AHEAD = 2  # jobs a worker that are under way or wait for it; results of more would fill the memory

Job = TypeVar("Job")
Result = TypeVar("Result")

_done: Any = None  # in a worker: the units of work that all workers have done together


class WorkerEnded(UserError):
    """The system ended a worker."""


class Workers:
    """A pool of processes; with one, or none, the work is done in this process.

    with Workers(2) as workers:
        for result in workers.map(function_of_a_module, jobs, progress): ...
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count or cores()
        self._pool: ProcessPoolExecutor | None = None
        if self.count > 1:
            context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
            self._done = context.Value("q", 0)
            self._pool = ProcessPoolExecutor(self.count, context, _begin, (self._done,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            for process in list((self._pool._processes or {}).values()) if error else ():
                process.terminate()  # what it does is not wanted any more
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job], progress: Progress) -> Iterator[Result]:
        """The results of `function`, which a worker can import, in the order of `jobs`.

        `progress` is told what the function tells by `advance`.

        Raises:
            WorkerEnded: the system ended a worker.
        """
        if self._pool is None:
            global _done
            _done = progress
            yield from map(function, jobs)
            return
        waiting = deque[Future[Result]]()
        before = self._done.value

        def result() -> Result:
            future = waiting.popleft()
            while True:
                progress.at(self._done.value - before)
                try:
                    return future.result(LOOK)
                except TimeoutError:
                    if future.done():  # it is the function's own
                        raise

        try:
            for job in jobs:
                waiting.append(self._pool.submit(function, job))
                if len(waiting) >= AHEAD * self.count:
                    yield result()
            while waiting:
                yield result()
        except BrokenProcessPool:
            raise WorkerEnded(
                "a process that prepared data was ended by the system, most likely as the machine has too little "
                "memory. Run the same command again to resume, on fewer cores if need be: taskset -c 0 make data ..."
            ) from None


def advance(more: int) -> None:
    """Tell the progress bar of `Workers.map` of work that is done."""
    if isinstance(_done, Progress):
        _done.advance(more)
    elif _done is not None:
        with _done.get_lock():
            _done.value += more


def _begin(done: Any) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
