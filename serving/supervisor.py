"""The supervisor: starts the engine, Triton and the gateway, notices when one of them dies or hangs, and restarts it.

What it watches, ten times a second:

    engine   its process, and the heartbeats that its generating loop sends over the socket
    Triton   its process and its Python stubs, the heartbeat files that the stubs' answering threads touch, its HTTP;
             and where nothing has been generated for a while, a real generation of one token through Triton
    gateway  its process, and that it answers

A process that is silent for too long is killed; the kernel then closes its connections, so that waiting clients get an
error at once. Triton and its stubs are restarted together, since a client whose stub has died would wait for ever. The
engine is restarted alone: the stub answers every waiting client with an error and exits, and Triton reports "not ready"
until the engine is back. All processes end with the supervisor, however it ends, and what they leave in shared memory
is removed.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import logging.handlers
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from core.artifacts import ServerStatus
from core.errors import UserError
from serving import protocol, triton_server
from serving.processes import LOG_BYTES, ManagedProcess, adopt_orphans, descendants, is_stopped, lives
from serving.state import ENGINE_SOCKET, State

TICK = 0.1  # seconds
# Seconds without a sign of life after which a process counts as hung ...
SILENCE_STOPPED = 1.0  # ... if it, or a child of it, was stopped by a signal
SILENCE = 1.5  # ... if it is idle
SILENCE_BUSY = 15.0  # ... if it computes or waits for a processor: on a busy machine a step may take long
START = 60.0  # seconds that Triton may take to start once the engine answers
PROBE_EVERY = 10.0  # seconds without a generated token after which one is requested
PROBE_DEADLINE = 5.0
DRAIN = 7.0  # seconds that requests in flight have to finish after SIGTERM, of 10 in all
LEAVE = 3.0  # seconds that a stub may take to exit after it has lost its engine; it needs one
LAST_WORDS = 0.5  # seconds for Triton to deliver the last responses
HEARTBEATS = [f"{model}.heartbeat" for model in triton_server.MODELS]
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ServerOptions:
    """What to serve, and where; `commands.serve` has the meanings.

    Attributes:
        engine: further arguments of `python -m serving.engine`.
    """

    folder: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    gateway_port: int = 9000
    log_text: bool = False
    engine: tuple[str, ...] = ()


class Supervisor:
    """One server. `run` returns when it has ended.

    Args:
        state: the server's state folder, whose lock the caller holds.
        say: shows a line to the user.
    """

    def __init__(self, options: ServerOptions, state: State, say: Callable[[str], None]) -> None:
        self.options, self.state, self.say = options, state, say
        self.folder = state.folder.resolve()
        self.events = _event_log(self.folder / "events.jsonl")
        self.shared_memory = f"triton_gemma_{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}_"
        self.starts = 0  # of Triton
        self.heartbeat: dict[str, Any] = {}  # the engine's latest
        self.generated_at = time.monotonic()
        self.stubs: dict[str, psutil.Process] = {}
        self.leaving: tuple[psutil.Process, float] | None = None  # the stub that has lost its engine, and when
        self.moved: dict[str, int] = {}  # heartbeat file of a stub: its modification time in ns
        self.is_loaded = False  # whether Triton reports the model ready
        self.ending = asyncio.Event()
        self.here = here = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
        self.http = httpx.AsyncClient(base_url=f"http://{here}:{options.http_port}", trust_env=False)
        texts = {"SERVING_LOG_TEXT": "1" if options.log_text else "0"}
        self.engine = ManagedProcess(
            "engine",
            [
                sys.executable,
                "-u",
                "-m",
                "serving.engine",
                "--base",
                str((options.folder / "base").resolve()),
                "--adapters",
                str((options.folder / "adapters").resolve()),
                "--socket",
                ENGINE_SOCKET,
                *options.engine,
            ],
            self.folder,
            self.folder / "engine.log",
            {"PYTHONPATH": str(ROOT)},
            expendable=True,
        )
        self.triton = ManagedProcess(
            "triton", [], self.folder, self.folder / "triton.log", triton_server.environment() | texts
        )
        self.gateway = ManagedProcess(
            "gateway",
            [
                sys.executable,
                "-u",
                "-m",
                "serving.gateway",
                "--host",
                options.host,
                "--port",
                str(options.gateway_port),
                "--triton",
                f"{here}:{options.grpc_port}",
            ],
            ROOT,
            self.folder / "gateway.log",
            texts,
        )
        self.processes = [self.engine, self.triton, self.gateway]
        self.restarts = {process.name: 0 for process in self.processes}

    # --- from start to end --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start everything, keep it running, and end it on SIGTERM or SIGINT.

        Raises:
            UserError: a port is taken, Triton is not installed, or a process ended before everything was up.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._asked_to_end)
        adopt_orphans()
        self._check_ports()
        try:
            triton_server.lay_out_backend(self.folder / "backends")
        except triton_server.NoTriton as error:
            raise UserError(str(error)) from None
        self._end_leftovers()
        self._write_status()
        watchers = [self._receive_heartbeats, self._ask_triton, self._ask_gateway, self._probe]
        tasks = [asyncio.create_task(_forever(watcher)) for watcher in watchers]
        try:
            for process in self.processes:  # all at once; Triton's model waits for the engine
                self._start(process)
            await self._until_ready()
            while not self.ending.is_set():
                self._tick()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.ending.wait(), TICK)
            await self._drain()
        finally:
            for task in tasks:
                task.cancel()
            for process in reversed(self.processes):
                process.kill()
            await self.http.aclose()
            triton_server.clean_up()
            self._clean_up()
            shutil.rmtree(self.folder / "backends", ignore_errors=True)
            self._note("ended")

    def _check_ports(self) -> None:
        """
        Raises:
            UserError: two ports are equal, or one is taken.
        """
        options = self.options
        named = {
            "http_port": options.http_port,
            "grpc_port": options.grpc_port,
            "metrics_port": options.metrics_port,
            "gateway_port": options.gateway_port,
        }
        if len(set(named.values())) < len(named):
            raise UserError(f"every port must be different, not {', '.join(f'{k}={v}' for k, v in named.items())}")
        for name, port in named.items():
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    trial.bind((options.host, port))
                except (OSError, OverflowError) as error:
                    reason = getattr(error, "strerror", None) or error
                    raise UserError(
                        f"port {port} of {options.host} cannot be used ({reason}). Stop the program that uses it, or "
                        f"choose another port: make serve ARGS={name}=PORT"
                    ) from None

    def _end_leftovers(self) -> None:
        """Remove what an earlier server of this folder left behind when it was killed: stopped stubs and files."""
        for process in psutil.process_iter(["cmdline"]):
            if any(self.shared_memory in word for word in process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._clean_up()

    def _clean_up(self) -> None:
        self._clean_shared_memory()
        for file in (ENGINE_SOCKET, *HEARTBEATS):
            (self.folder / file).unlink(missing_ok=True)

    def _clean_shared_memory(self) -> None:
        for region in Path("/dev/shm").glob(f"{self.shared_memory}*"):
            region.unlink(missing_ok=True)

    def _start(self, process: ManagedProcess) -> None:
        if process is self.engine:
            (self.folder / ENGINE_SOCKET).unlink(missing_ok=True)
        if process is self.triton:
            self._clean_shared_memory()
            self.stubs, self.moved, self.starts, self.is_loaded = {}, {}, self.starts + 1, False
            self.leaving = None
            options = self.options
            ports = {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
            process.command = triton_server.command(
                (options.folder / "repository").resolve(),
                self.folder / "backends",
                options.host,
                ports,
                round(DRAIN + 2),
                f"{self.shared_memory}{self.starts}_",
            )
        process.start()
        self._note("started", part=process.name, process=process.pid)

    async def _until_ready(self) -> None:
        """
        Raises:
            UserError: a process has ended; the message has the last line of its log.
        """
        while not self.is_up and not self.ending.is_set():
            for process in self.processes:
                if not process.is_running:
                    raise UserError(f"{process.why_it_ended()}. Its whole log is {process.log}")
            await asyncio.sleep(TICK)

    @property
    def is_up(self) -> bool:
        return all(process.is_up for process in self.processes)

    @property
    def _requests(self) -> int:
        """How many the engine had, running or waiting, by its latest heartbeat."""
        return int(self.heartbeat.get("running", 0)) + int(self.heartbeat.get("waiting", 0))

    def _asked_to_end(self) -> None:
        if self.ending.is_set():  # the second signal
            for process in self.processes:
                process.kill()
        self.ending.set()

    async def _drain(self) -> None:
        """Let requests in flight finish for `DRAIN` seconds; then answer the remaining ones with an error.

        The engine finishes what it has and refuses new requests. Triton alone would wait for every connection that a
        client keeps open.
        """
        running = self._requests
        self.say(f"Stopping{f' after {running} requests, within {DRAIN:.0f} s' if running else ''}")
        self._note("draining", running=running)
        for process in self.processes:
            process.ask_to_end()
        until = time.monotonic() + DRAIN
        while self.engine.is_running and time.monotonic() < until:
            await asyncio.sleep(TICK)
        self.engine.kill()  # the stub answers the clients that still wait
        await asyncio.sleep(LAST_WORDS)

    # --- watching -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Check every process once."""
        for process in self.processes:
            if process.popen is None:
                if time.monotonic() >= process.start_at:
                    self._start(process)
                continue
            if not process.is_running:
                self._reap(process)
                continue
            process.time_passes(TICK)
            if reason := self._hangs(process):
                process.ended_for = reason
                self._reap(process)

    def _reap(self, process: ManagedProcess) -> None:
        reason = process.reap()
        if process is self.engine and not self.leaving and (stub := self.stubs.get(triton_server.MODELS[0])):
            self.leaving = stub, time.monotonic()
        if process is self.triton:
            triton_server.clean_up()
        self.say(f"{reason}. Restarting it")
        self.restarts[process.name] += 1
        self._write_status()
        self._note("died", part=process.name, reason=reason)

    def _hangs(self, process: ManagedProcess) -> str:
        """Why `process` must be killed although it is running; "" where it is well."""
        if process is self.triton and (reason := self._lacks_a_stub() or self._keeps_a_stub()):
            return reason
        if process.silence > SILENCE_STOPPED and any(map(is_stopped, process.family)):
            return "it was stopped by a signal"
        if process.is_up and (process.stillness > SILENCE or process.silence > SILENCE_BUSY):
            return f"no sign of life for {process.silence:.1f} s"
        late = process is self.triton and self.engine.is_up and time.monotonic() - self.engine.up_at > START
        return f"it did not start within {START:.0f} s of the engine" if late and process.silence > START else ""

    def _lacks_a_stub(self) -> str:
        if not self.triton.is_up or (len(self.stubs) == len(HEARTBEATS) and all(map(lives, self.stubs.values()))):
            return ""
        self.stubs = {}
        for process in descendants(self.triton.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                if lives(process) and (model := triton_server.model_of(process.cmdline())):
                    self.stubs[model] = process
        # A stub that has lost its engine unloads its model, and another one is started.
        needed = triton_server.MODELS if self.is_loaded and self.engine.is_up else triton_server.MODELS[1:]
        missing = [model for model in needed if model not in self.stubs]
        return f"the stub of {missing[0]} has died" if missing else ""

    def _keeps_a_stub(self) -> str:
        """Why Triton must be killed for a stub that it keeps after its model was unloaded; "" where it need not.

        Triton 2.51 now and then keeps one for ever, where a gRPC stream was cancelled at that moment. It is killed when
        it has nothing to do: while the next engine starts, or once that has no requests. The stub only costs memory.
        """
        if not self.leaving:
            return ""
        stub, since = self.leaving
        if not lives(stub):
            self.leaving = None
        elif time.monotonic() - since > LEAVE and not (self.engine.is_up and self._requests):
            return "it kept a stub that had lost its engine"
        return ""

    async def _receive_heartbeats(self) -> None:
        """Receive every heartbeat of the engine, on a connection of our own."""
        reader, writer = await asyncio.open_unix_connection(self.state.engine, limit=protocol.MAX_LINE)
        try:
            while line := await reader.readline():
                heartbeat = protocol.decode(line).get("heartbeat")
                if heartbeat is None:
                    continue
                if not self.engine.is_up or heartbeat["tokens"] != self.heartbeat.get("tokens"):
                    self.generated_at = time.monotonic()
                self.heartbeat = heartbeat
                self.engine.answered()
        finally:
            writer.close()

    async def _ask_triton(self) -> None:
        """Triton is alive while it answers and the stubs of its loaded models have touched their heartbeat files."""
        await asyncio.sleep(2 * TICK)
        self.is_loaded = (await self.http.get("/v2/models/gemma/ready", timeout=1)).status_code == 200
        if not self.triton.is_up:
            if not self.is_loaded:
                return
            # Its first request tells the catalogue that Triton's model control may be used from now on.
            await self.http.post("/v2/models/adapters/generate", json={"name": ""}, timeout=5)
        expected = HEARTBEATS if self.is_loaded else HEARTBEATS[1:]
        moved = {heartbeat: (self.folder / heartbeat).stat().st_mtime_ns for heartbeat in expected}
        if all(self.moved.get(heartbeat) != at for heartbeat, at in moved.items()):
            self.moved |= moved
            self.triton.answered()

    async def _ask_gateway(self) -> None:
        await asyncio.sleep(4 * TICK)
        asked = await self.http.get(f"http://{self.here}:{self.options.gateway_port}/metrics", timeout=1)
        if asked.status_code == 200:
            self.gateway.answered()

    async def _probe(self) -> None:
        """Generate a token through Triton where none has been generated for a while."""
        await asyncio.sleep(1)
        for process in self.processes:
            process.shorten_log()
        idle = time.monotonic() - self.generated_at
        before = [process.is_up and process.up_at for process in (self.engine, self.triton)]
        if idle < PROBE_EVERY or not all(before) or self.ending.is_set():
            return
        body = {"text_input": "Hello", "parameters": {"max_tokens": 1, "temperature": 0}}
        try:
            answer = await self.http.post("/v2/models/gemma/generate", json=body, timeout=PROBE_DEADLINE)
            from_engine = any(f"{code}: " in answer.text for code in (protocol.BUSY, protocol.UNAVAILABLE))
            problem = "" if answer.status_code == 200 or from_engine else answer.text[:200]
        except httpx.HTTPError as error:
            problem = "" if self._requests else type(error).__name__  # slow, but it did reach the engine
        if not problem:
            self.generated_at = time.monotonic()
        elif (
            before == [process.is_up and process.up_at for process in (self.engine, self.triton)]
            and not self.ending.is_set()
        ):
            self.triton.ended_for = f"it could not generate a token ({problem})"
            self._reap(self.triton)

    # --- status and events ------------------------------------------------------------------------------------------

    def _write_status(self) -> None:
        options = self.options
        self.state.write(
            ServerStatus(
                pid=os.getpid(),
                host=options.host,
                http_port=options.http_port,
                grpc_port=options.grpc_port,
                metrics_port=options.metrics_port,
                gateway_port=options.gateway_port,
                base=(options.folder / "base").resolve().name,
                restarts=self.restarts,
            )
        )

    def _note(self, event: str, **about: Any) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.events.info(json.dumps({"time": at, "event": event, **about}, ensure_ascii=False))


async def _forever(watcher: Callable[[], Awaitable[None]]) -> None:
    while True:
        with contextlib.suppress(OSError, ValueError, httpx.HTTPError, protocol.RequestError):
            await watcher()
        await asyncio.sleep(TICK)  # nothing answers yet, or no longer


def _event_log(file: Path) -> logging.Logger:
    handler = logging.handlers.RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("events")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    return log
