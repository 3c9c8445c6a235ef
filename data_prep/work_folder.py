"""Where a large source is prepared: a folder beside the data folder, in which a killed command leaves what was done.

    .slang.work/<fingerprint>/part-000007-0-of-2.sqlite, .json  a part of a file that was read (read_rows.py)
                              rows.sqlite, rows.json  all rows, merged and grouped; what comes then is written

It is as large as the rows, about twice, and goes when the data folder is there. Of another fingerprint it is made anew.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import beside, read_json, sync, write_json
from data_prep.row_store import RowStore
from data_prep.workers import WorkerEnded, Workers

ROWS_AT_ONCE = 16_384  # of a job, where rows are read from the store


class WorkFolder:
    """The folder of a source that is being prepared, and the processes that do it."""

    def __init__(self, path: Path, workers: Workers) -> None:
        self.path, self.workers = path, workers
        self.store = path / "rows.sqlite"
        self._about = path / "rows.json"

    def gathered(self) -> dict[str, Any] | None:
        """What was kept of the rows when all were in the store; None where they are not."""
        return read_json(self._about) if self._about.exists() else None

    def keep(self, store: RowStore, about: dict[str, Any]) -> None:
        """Let the rows in `store` be found by the next command."""
        store.commit()
        sync(self.store)
        write_json(self._about, about)
        for part in self.path.glob("part-*"):
            part.unlink()

    def ranges(self, last: int) -> Iterator[tuple[int, int]]:
        """Numbers of rows `(above, last)`, a range for each job."""
        step = min(ROWS_AT_ONCE, last // (4 * self.workers.count) + 1)
        return ((above, above + step) for above in range(0, last, step))


@contextmanager
def work_folder(folder: Path, fingerprint: str) -> Iterator[WorkFolder]:
    """The work folder of the data folder `folder`. It goes where a UserError ends the `with` block, as another attempt
    would meet that again; else `remove_work` takes it away."""
    above = beside(folder.resolve(), "work")
    path = above / fingerprint[:16]
    for other in above.iterdir() if above.is_dir() else ():
        if other != path:
            shutil.rmtree(other)
    path.mkdir(parents=True, exist_ok=True)
    try:
        with Workers() as workers:
            yield WorkFolder(path, workers)
    except WorkerEnded:
        raise
    except UserError:
        shutil.rmtree(above)
        raise


def remove_work(folder: Path) -> None:
    """Remove the work folder of a data folder that is done."""
    shutil.rmtree(beside(folder.resolve(), "work"), ignore_errors=True)
