"""The engine's Unix socket: an asyncio loop in a thread of its own, beside the one that generates.

Lines become requests here, prompts become tokens here; what the generating loop sends is written here. The two meet in
a queue of calls (`Inbox`) and in `Connection.send`.
"""

import asyncio
import os
import queue
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.engine import UserError
from serving.engine.scheduler import Request, Scheduler
from serving.protocol import INTERNAL, MAX_LINE, Failed, RequestError, decode, encode, read_generate

MAX_UNREAD = 64 << 20  # bytes a client may leave unread before its connection is closed
Inbox = queue.SimpleQueue[Callable[[], object]]


class Connection:
    """One client. Its messages are gathered until `flush`, which costs the generating loop one call a step."""

    def __init__(self, writer: asyncio.StreamWriter, loop: asyncio.AbstractEventLoop) -> None:
        self.writer, self.loop = writer, loop
        self.pending: list[bytes] = []
        self.open: set[int] = set()  # ids of requests without a last message
        self.cancelled: set[int] = set()  # those of them that were cancelled before they were tokens
        self.closed = False

    def send(self, message: dict[str, Any]) -> None:
        self.pending.append(encode(message))
        if "done" in message or "error" in message:
            self.open.discard(message["id"])

    def flush(self) -> None:
        if self.pending and not self.closed:
            data = b"".join(self.pending)
            self.loop.call_soon_threadsafe(self._write, data)
        self.pending.clear()

    def _write(self, data: bytes) -> None:
        if self.closed:
            return
        if self.writer.transport.get_write_buffer_size() > MAX_UNREAD:
            self.writer.transport.abort()
        else:
            self.writer.write(data)


class Connections:
    """All clients of a socket."""

    def __init__(self, path: Path, scheduler: Scheduler, inbox: Inbox, describe: Callable[[], dict[str, Any]]) -> None:
        """
        Args:
            path: of the socket; an old file there is replaced if nobody listens on it.
            describe: what `{"op": "stats"}` is answered with; called by the generating loop.

        Raises:
            UserError: the socket cannot be made there.
        """
        self.path, self.scheduler, self.inbox, self.describe = path, scheduler, inbox, describe
        self.tokenizer = scheduler.tokenizer
        self.most_characters = max(map(len, self.tokenizer.get_vocab(with_added_tokens=True)))
        self.all: set[Connection] = set()
        self.loop = asyncio.new_event_loop()
        started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, args=(started,), name="connections", daemon=True)
        self.thread.start()
        if error := started.get():
            raise UserError(f"the socket {path} cannot be opened: {error}")

    def flush(self) -> None:
        for connection in list(self.all):
            connection.flush()

    def send_heartbeat(self, heartbeat: dict[str, Any]) -> None:
        for connection in list(self.all):
            connection.send({"heartbeat": heartbeat})

    def close(self) -> None:
        """Write what is left, for a second at most, and take the socket away."""
        self.path.unlink(missing_ok=True)
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(timeout=2)

    async def _close(self) -> None:
        deadline = time.monotonic() + 1
        writers = [connection.writer for connection in self.all]
        while any(one.transport.get_write_buffer_size() for one in writers) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def _serve(self, started: "queue.SimpleQueue[Exception | None]") -> None:
        try:
            if self.path.exists() and stat.S_ISSOCK(self.path.stat().st_mode):
                self.path.unlink()
            mask = os.umask(0o177)
            try:
                server = asyncio.start_unix_server(self._talk, self.path, limit=MAX_LINE)
                self.server = self.loop.run_until_complete(server)
            finally:
                os.umask(mask)
        except Exception as error:
            started.put(error)
            return
        started.put(None)
        self.loop.run_forever()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer, self.loop)
        self.all.add(connection)
        tasks: set[asyncio.Task[None]] = set()
        try:
            while line := await reader.readline():
                if line.strip():
                    task = asyncio.create_task(self._heed(connection, line))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    await asyncio.sleep(0)
        except (ValueError, asyncio.LimitOverrunError):  # a line of more than MAX_LINE bytes: where it ends is unknown
            self._say(connection, Failed(None, f"a line has more than {MAX_LINE >> 20} MiB", "invalid").as_json())
        except ConnectionError:
            pass
        finally:
            self.all.discard(connection)
            connection.closed = True
            self.inbox.put(lambda: self.scheduler.cancel(lambda one: one.connection is connection))
            writer.close()

    async def _heed(self, connection: Connection, line: bytes) -> None:
        """One line of a client."""
        number = None
        try:
            message = decode(line)
            number = message.get("id") if isinstance(message.get("id"), int) else None
            match message.get("op"):
                case "generate":
                    await self._generate(connection, message)
                case "cancel":
                    self.inbox.put(lambda: self._cancel(connection, number))
                case "stats":
                    self.inbox.put(lambda: connection.send({"stats": self.describe()}))
                case other:
                    raise RequestError(f"op is {str(other)[:40]!r}, not one of generate, cancel, stats")
        except RequestError as error:
            self._say(connection, Failed(number, error.sentence, error.code).as_json())
        except Exception as error:
            self._say(connection, Failed(number, f"the request failed: {type(error).__name__}", INTERNAL).as_json())

    def _say(self, connection: Connection, message: dict[str, Any]) -> None:
        """Written from this thread: it may be about an id that is open, which ends with its own message."""
        if not connection.closed:
            connection.writer.write(encode(message))

    async def _generate(self, connection: Connection, message: dict[str, Any]) -> None:
        arrived = time.monotonic()
        asked = read_generate(message)
        if asked.id in connection.open:
            raise RequestError(f"id {asked.id} is in use by another request of this connection")
        connection.open.add(asked.id)
        try:
            longest = self.scheduler.longest
            if len(asked.prompt) > longest * self.most_characters:
                raise RequestError(f"the prompt has {len(asked.prompt):,} characters, more than {longest} tokens hold")
            # A long text takes the tokenizer a while, in which others are heard.
            if len(asked.prompt) > 4096:
                encoded = await asyncio.to_thread(self.tokenizer.encode, asked.prompt)
            else:
                encoded = self.tokenizer.encode(asked.prompt)
        except BaseException:
            connection.open.discard(asked.id)
            raise
        request = Request(
            asked, encoded.ids, lambda one: connection.send(one.as_json()), arrived, connection=connection
        )
        self.inbox.put(lambda: self._submit(connection, request))

    def _submit(self, connection: Connection, request: Request) -> None:
        if connection.closed:
            return
        self.scheduler.submit(request)
        if request.asked.id in connection.cancelled:
            connection.cancelled.discard(request.asked.id)
            self._cancel(connection, request.asked.id)

    def _cancel(self, connection: Connection, number: int | None) -> None:
        found = self.scheduler.cancel(lambda one: one.connection is connection and one.asked.id == number)
        if not found and number in connection.open:
            connection.cancelled.add(number)
