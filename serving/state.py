"""The state folder of a server, `exports/serve/state`: who runs there, and what others may know of it.

The process that holds the lock on `lock` is the server; the kernel releases the lock however the process ends.
`status.json` has the server's addresses, its base model and how often each of its processes was restarted. Logs,
sockets and heartbeat files lie beside it.
"""

import fcntl
import json
import os
import socket
from pathlib import Path

from core.artifacts import EngineStats, ServerStatus
from serving import protocol

STATUS = "status.json"
ENGINE_SOCKET = "engine.sock"


class State:
    """One server's state folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None
        self._opened: int | None = None

    def take(self) -> bool:
        """Become the server of this folder; False where another process is it already."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        return True

    def is_taken(self) -> bool:
        """Whether a server is running from this folder."""
        if not (self.folder / "lock").exists() or not self.take():
            return (self.folder / "lock").exists()
        assert self._lock is not None
        os.close(self._lock)
        self._lock = None
        return False

    @property
    def engine(self) -> str:
        """The path of the engine's socket, short enough for the limit on socket paths wherever the folder lies."""
        if self._opened is None:
            self._opened = os.open(self.folder, os.O_PATH)
        return f"/proc/self/fd/{self._opened}/{ENGINE_SOCKET}"

    def ask_engine(self, seconds: float) -> EngineStats:
        """The statistics of the running engine.

        Raises:
            OSError: no engine is running, or it does not answer within `seconds`.
            UserError: it is of another version.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(self.engine)
            connection.sendall(protocol.encode({"op": "stats"}))
            for line in connection.makefile("rb"):
                if stats := protocol.decode(line).get("stats"):
                    return EngineStats.parse(json.dumps(stats), "the statistics of the running engine")
        raise ConnectionError("the engine has ended")

    def write(self, status: ServerStatus) -> None:
        status.write(self.folder / STATUS)

    def read(self) -> ServerStatus:
        """What the server has written. Raises UserError: it has not yet, or that is damaged."""
        return ServerStatus.read(self.folder / STATUS)
