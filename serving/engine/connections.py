"""The engine's Unix socket: an asyncio loop in its own thread, beside the thread that generates.

Here lines are parsed to requests and prompts are tokenized, and the generating thread's messages are written. The two
threads communicate through a queue of calls (`Inbox`) and through `Connection.send`.
"""

import asyncio
import os
import queue
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from core.errors import UserError
from serving.engine.grammar import Constraint, GrammarCompiler
from serving.engine.scheduler import ScheduledRequest, Scheduler
from serving.protocol import INTERNAL, MAX_LINE, Failed, Generate, RequestError, decode, encode, read_generate

MAX_UNREAD = 64 << 20  # bytes that a client may leave unread before its connection is closed
Inbox = queue.SimpleQueue[Callable[[], object]]


class Connection:
    """One client. Its messages are collected until `flush`, so that a step costs the generating thread one call."""

    def __init__(self, writer: asyncio.StreamWriter, loop: asyncio.AbstractEventLoop) -> None:
        self.writer, self.loop = writer, loop
        self.pending: list[bytes] = []
        self.open_ids: set[int] = set()  # of requests that have not got their last message
        self.cancelled_ids: set[int] = set()  # of those, the ones cancelled while they were being tokenized
        self.closed = False

    def send(self, message: dict[str, Any]) -> None:
        self.pending.append(encode(message))
        if "done" in message or "error" in message:
            self.open_ids.discard(message["id"])

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
            path: of the socket; an old socket there is replaced.
            describe: returns the answer to `{"op": "stats"}`; called by the generating thread.

        Raises:
            UserError: the socket cannot be created there.
        """
        self.path, self.scheduler, self.inbox, self.describe = path, scheduler, inbox, describe
        self.tokenizer = scheduler.tokenizer
        self.grammars = GrammarCompiler(self.tokenizer, scheduler.eos_token_ids)
        self.compiling = ThreadPoolExecutor(1, "grammars")
        self.max_token_characters = max(map(len, self.tokenizer.get_vocab(with_added_tokens=True)))
        self.connections: set[Connection] = set()
        self.loop = asyncio.new_event_loop()
        started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, args=(started,), name="connections", daemon=True)
        self.thread.start()
        if error := started.get():
            raise UserError(f"the socket {path} cannot be opened: {error}")

    def flush(self) -> None:
        for connection in list(self.connections):
            connection.flush()

    def send_heartbeat(self, stats: dict[str, Any]) -> None:
        """Send `stats` (`Scheduler.stats`) to every client."""
        for connection in list(self.connections):
            connection.send({"heartbeat": stats})

    def close(self) -> None:
        """Remove the socket and write what is pending, for at most a second."""
        self.path.unlink(missing_ok=True)
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(timeout=2)

    async def _close(self) -> None:
        deadline = time.monotonic() + 1
        writers = [connection.writer for connection in self.connections]
        while any(one.transport.get_write_buffer_size() for one in writers) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def _serve(self, started: "queue.SimpleQueue[Exception | None]") -> None:
        try:
            if self.path.exists() and stat.S_ISSOCK(self.path.stat().st_mode):
                self.path.unlink()
            mask = os.umask(0o177)
            try:
                server = asyncio.start_unix_server(self._read_lines, self.path, limit=MAX_LINE)
                self.server = self.loop.run_until_complete(server)
            finally:
                os.umask(mask)
        except Exception as error:
            started.put(error)
            return
        started.put(None)
        self.loop.run_forever()

    async def _read_lines(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer, self.loop)
        self.connections.add(connection)
        tasks: set[asyncio.Task[None]] = set()
        try:
            while line := await reader.readline():
                if line.strip():
                    task = asyncio.create_task(self._handle_line(connection, line))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    await asyncio.sleep(0)
        except (ValueError, asyncio.LimitOverrunError):  # a line of more than MAX_LINE bytes, whose end is unknown
            self._reply(connection, Failed(None, f"a line has more than {MAX_LINE >> 20} MiB", "invalid").as_json())
        except ConnectionError:
            pass
        finally:
            self.connections.discard(connection)
            connection.closed = True
            self.inbox.put(lambda: self.scheduler.cancel(lambda one: one.connection is connection))
            writer.close()

    async def _handle_line(self, connection: Connection, line: bytes) -> None:
        """Handle one line of a client."""
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
            self._reply(connection, Failed(number, error.sentence, error.code).as_json())
        except Exception as error:
            self._reply(connection, Failed(number, f"the request failed: {type(error).__name__}", INTERNAL).as_json())

    def _reply(self, connection: Connection, message: dict[str, Any]) -> None:
        """Write from this thread. Not `Connection.send`, which would take an error for the last message of an open
        id."""
        if not connection.closed:
            connection.writer.write(encode(message))

    async def _generate(self, connection: Connection, message: dict[str, Any]) -> None:
        arrived = time.monotonic()
        generate = read_generate(message)
        if generate.id in connection.open_ids:
            raise RequestError(f"id {generate.id} is in use by another request of this connection")
        connection.open_ids.add(generate.id)
        try:
            tokens = await self._tokenize(generate)
            constraint = None
            if generate.sampling.structured_outputs:
                constraint = await self.loop.run_in_executor(self.compiling, self._compile, connection, generate)
        except BaseException:
            connection.open_ids.discard(generate.id)
            connection.cancelled_ids.discard(generate.id)
            raise
        request = ScheduledRequest(
            generate, tokens, lambda one: connection.send(one.as_json()), arrived, connection, constraint
        )
        self.inbox.put(lambda: self._submit(connection, request))

    async def _tokenize(self, generate: Generate) -> list[int]:
        """The tokens of a prompt: all, or those that `truncate_prompt_tokens` keeps.

        Raises:
            RequestError: it has more characters than the context can hold.
        """
        room, begins = self.scheduler.max_model_len, 0
        if isinstance(generate.prompt, str):
            if len(generate.prompt) > room * self.max_token_characters:
                raise RequestError(
                    f"the prompt has {len(generate.prompt):,} characters, more than {room} tokens can hold"
                )
            # Tokenizing a long text takes a while, during which other lines must be handled.
            if len(generate.prompt) > 4096:
                encoded = await asyncio.to_thread(self.tokenizer.encode, generate.prompt)
            else:
                encoded = self.tokenizer.encode(generate.prompt)
            tokens, begins = encoded.ids, encoded.special_tokens_mask[0]  # <bos>, without which Gemma is lost
        else:
            tokens = list(generate.prompt)
        kept = generate.sampling.truncate_prompt_tokens
        if kept is None:
            return tokens
        kept = max(1, kept if kept >= 0 else room - generate.sampling.max_tokens)
        return tokens if len(tokens) <= kept else [*tokens[:begins], *tokens[len(tokens) - kept + begins :]]

    def _compile(self, connection: Connection, generate: Generate) -> Constraint | None:
        """What the answer must match; None for a client that has left, so that others need not wait for its turn."""
        wanted = generate.sampling.structured_outputs
        if wanted is None or connection.closed or generate.id in connection.cancelled_ids:
            return None
        return self.grammars.compile(wanted)

    def _submit(self, connection: Connection, request: ScheduledRequest) -> None:
        if connection.closed:
            return
        self.scheduler.submit(request)
        if request.generate.id in connection.cancelled_ids:
            connection.cancelled_ids.discard(request.generate.id)
            self._cancel(connection, request.generate.id)

    def _cancel(self, connection: Connection, number: int | None) -> None:
        found = self.scheduler.cancel(lambda one: one.connection is connection and one.generate.id == number)
        if not found and number in connection.open_ids:
            connection.cancelled_ids.add(number)
