"""A file of records that never stops whom it is about: what cannot be written is counted, and said once.

A copy of this file lies beside Triton's model.py, so it needs only the standard library.
"""

import contextlib
import json
import logging
import logging.handlers
import os
import sys
from pathlib import Path


class RecordFile(logging.handlers.RotatingFileHandler):
    """Appends messages, one a line, and rotates the file.

    While that fails, as on a full disk, lines are lost; after the next that is written stands
    {"lost_lines": how many, "reason": why}.
    """

    def __init__(self, file: Path, size: int, backups: int) -> None:
        super().__init__(file, maxBytes=size, backupCount=backups, encoding="utf-8", delay=True)
        self._lost, self._reason = 0, ""
        self._whole = 0  # bytes of complete lines
        with contextlib.suppress(OSError):
            self.stream = self._open()

    def emit(self, record: logging.LogRecord) -> None:
        lost = self._lost
        super().emit(record)
        if self._lost != lost:
            return
        if lost:
            self._lost = 0
            super().emit(logging.makeLogRecord({"msg": json.dumps({"lost_lines": lost, "reason": self._reason})}))
        if self.stream:
            self._whole = os.fstat(self.stream.fileno()).st_size

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        self._reason = getattr(error, "strerror", None) or str(error)
        with contextlib.suppress(OSError):
            if not self._lost:
                print(f"{self.baseFilename} cannot be written ({self._reason}): lines are lost", file=sys.stderr)
        self._lost += 1
        with contextlib.suppress(OSError):
            if self.stream:  # with half a line in it
                self.stream.close()
        self.stream = None  # opened again for the next line
        with contextlib.suppress(OSError):
            if Path(self.baseFilename).stat().st_size > self._whole:
                os.truncate(self.baseFilename, self._whole)


def record_log(name: str, file: Path, size: int, backups: int) -> logging.Logger:
    """The log `name`, which writes only to `file`."""
    handler = RecordFile(file, size, backups)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger(name)
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    return log
