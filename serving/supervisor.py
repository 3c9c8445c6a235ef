"""The supervisor: starts engine, Triton and door, knows when one of them has died or hangs, and starts it again.

What it watches, ten times a second:

    engine   its process, and the beats that its generating loop sends over the socket
    Triton   its process and its Python stubs', the beats that the stubs' answering threads leave, its HTTP;
             and where nothing has been generated for a while, a real generation of one token through Triton
    door     its process, and that it answers

A part that is silent for too long is killed; the kernel then ends its connections, so that whoever waits is told.
Triton and its stubs go together: a client whose stub has died would wait for ever. The engine goes alone: the stub
answers everybody who waits and leaves, and Triton reports "not ready" until the engine is back. Every part ends with
the supervisor, however that ends, and what it leaves in shared memory is removed.
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
from serving import protocol, triton_server
from serving.processes import LOG_BYTES, Part, adopt_orphans, descendants, is_stopped, lives
from serving.state import ENGINE_SOCKET, State

TICK = 0.1  # seconds
# Seconds without a sign of life after which a part hangs ...
SILENCE_STOPPED = 1.0  # ... that was stopped, or a process of it
SILENCE = 1.5  # ... that does nothing
SILENCE_BUSY = 15.0  # ... that computes, or waits for a processor: a step may be long on a machine that is busy
START = 60.0  # seconds that Triton may take once the engine answers
PROBE_EVERY = 10.0  # seconds without a generated token before one is asked for
PROBE_DEADLINE = 5.0
DRAIN = 7.0  # seconds that requests in flight have to end after SIGTERM, of 10 in all
LEAVE = 3.0  # seconds that a stub may take to end when it has lost its engine; it takes one
LAST_WORDS = 0.5  # seconds for Triton to hand on what it has been given
BEATS = [f"{model}.beat" for model in triton_server.MODELS]
ROOT = Path(__file__).resolve().parent.parent


class StartError(Exception):
    """What keeps the server from starting; its text says what to do."""


@dataclass(frozen=True)
class Options:
    """See `python -m commands.serve --help`."""

    folder: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    door_port: int = 9000
    log_text: bool = False
    engine: tuple[str, ...] = ()  # arguments of serving.engine


class Supervisor:
    """One server. `run` returns when it has ended.

    Args:
        state: taken by us.
        say: shows a line to the user.
    """

    def __init__(self, options: Options, state: State, say: Callable[[str], None]) -> None:
        self.options, self.state, self.say = options, state, say
        self.folder = state.folder.resolve()
        self.events = _event_log(self.folder / "events.jsonl")
        self.shared_memory = f"triton_gemma_{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}_"
        self.starts = 0  # of Triton
        self.beat: dict[str, Any] = {}  # the engine's last
        self.generated_at = time.monotonic()
        self.stubs: dict[str, psutil.Process] = {}
        self.leaving: tuple[psutil.Process, float] | None = None  # the stub that has lost its engine, and when
        self.moved: dict[str, int] = {}  # a stub's beat: when it was touched
        self.is_loaded = False  # the model, as Triton says
        self.ending = asyncio.Event()
        self.here = here = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
        self.http = httpx.AsyncClient(base_url=f"http://{here}:{options.http_port}", trust_env=False)
        texts = {"SERVING_LOG_TEXT": "1" if options.log_text else "0"}
        self.engine = Part(
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
        self.triton = Part("triton", [], self.folder, self.folder / "triton.log", triton_server.environment() | texts)
        self.door = Part(
            "door",
            [
                sys.executable,
                "-u",
                "-m",
                "serving.gateway",
                "--host",
                options.host,
                "--port",
                str(options.door_port),
                "--triton",
                f"{here}:{options.grpc_port}",
            ],
            ROOT,
            self.folder / "door.log",
            texts,
        )
        self.parts = [self.engine, self.triton, self.door]
        self.restarts = {part.name: 0 for part in self.parts}

    # --- from start to end --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start everything, keep it alive, and end it on SIGTERM or SIGINT.

        Raises:
            StartError: a port is taken, no Triton, or a part ends before it has answered for the first time.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._asked_to_end)
        adopt_orphans()
        self._check_ports()
        try:
            triton_server.lay_out_backend(self.folder / "backends")
        except triton_server.NoTriton as error:
            raise StartError(str(error)) from None
        self._end_leftovers()
        self._write_status()
        watchers = [self._hear_engine, self._ask_triton, self._ask_door, self._probe]
        tasks = [asyncio.create_task(_forever(watcher)) for watcher in watchers]
        try:
            for part in self.parts:  # all at once: Triton's model waits for the engine
                self._start(part)
            await self._until_ready()
            while not self.ending.is_set():
                self._tick()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.ending.wait(), TICK)
            await self._drain()
        finally:
            for task in tasks:
                task.cancel()
            for part in reversed(self.parts):
                part.kill()
            await self.http.aclose()
            triton_server.clean_up()
            self._clean_up()
            shutil.rmtree(self.folder / "backends", ignore_errors=True)
            self._note("ended")

    def _check_ports(self) -> None:
        """
        Raises:
            StartError: naming the port that cannot be had.
        """
        options = self.options
        named = {
            "--http-port": options.http_port,
            "--grpc-port": options.grpc_port,
            "--metrics-port": options.metrics_port,
            "--door-port": options.door_port,
        }
        if len(set(named.values())) < len(named):
            raise StartError(f"each needs a port of its own: {', '.join(f'{k} {v}' for k, v in named.items())}")
        for name, port in named.items():
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    trial.bind((options.host, port))
                except (OSError, OverflowError) as error:
                    reason = getattr(error, "strerror", None) or error
                    raise StartError(
                        f"port {port} of {options.host} cannot be had ({reason}). End what has it, or "
                        f'take another: make serve ARGS="{name} …"'
                    ) from None

    def _end_leftovers(self) -> None:
        """What an earlier server of this folder has left, where it was killed: stubs that were stopped, files."""
        for process in psutil.process_iter(["cmdline"]):
            if any(self.shared_memory in word for word in process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._clean_up()

    def _clean_up(self) -> None:
        self._clean_shared_memory()
        for file in (ENGINE_SOCKET, *BEATS):
            (self.folder / file).unlink(missing_ok=True)

    def _clean_shared_memory(self) -> None:
        for region in Path("/dev/shm").glob(f"{self.shared_memory}*"):
            region.unlink(missing_ok=True)

    def _start(self, part: Part) -> None:
        if part is self.engine:
            (self.folder / ENGINE_SOCKET).unlink(missing_ok=True)
        if part is self.triton:
            self._clean_shared_memory()
            self.stubs, self.moved, self.starts, self.is_loaded = {}, {}, self.starts + 1, False
            self.leaving = None
            options = self.options
            ports = {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
            part.command = triton_server.command(
                (options.folder / "repository").resolve(),
                self.folder / "backends",
                options.host,
                ports,
                round(DRAIN + 2),
                f"{self.shared_memory}{self.starts}_",
            )
        part.start()
        self._note("started", part=part.name, process=part.pid)

    async def _until_ready(self) -> None:
        """
        Raises:
            StartError: a part has ended; with its last words.
        """
        while not self.is_up and not self.ending.is_set():
            for part in self.parts:
                if not part.is_running:
                    raise StartError(f"{part.why_it_ended()}. All it said is in {part.log}")
            await asyncio.sleep(TICK)

    @property
    def is_up(self) -> bool:
        return all(part.is_up for part in self.parts)

    def _asked_to_end(self) -> None:
        if self.ending.is_set():  # asked twice
            for part in self.parts:
                part.kill()
        self.ending.set()

    async def _drain(self) -> None:
        """Let requests in flight end, for `DRAIN` seconds; then tell those who still wait.

        The engine answers what it has and refuses the rest; Triton would wait for each connection that a client keeps.
        """
        running = int(self.beat.get("running", 0)) + int(self.beat.get("waiting", 0))
        self.say(f"Ending{f', after {running} requests, in {DRAIN:.0f} s at most' if running else ''}")
        self._note("draining", running=running)
        for part in self.parts:
            part.ask_to_end()
        until = time.monotonic() + DRAIN
        while self.engine.is_running and time.monotonic() < until:
            await asyncio.sleep(TICK)
        self.engine.kill()  # the stub answers who still waits
        await asyncio.sleep(LAST_WORDS)

    # --- watching -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Look at every part once."""
        for part in self.parts:
            if part.process is None:
                if time.monotonic() >= part.start_at:
                    self._start(part)
                continue
            if not part.is_running:
                self._bury(part)
                continue
            part.time_passes(TICK)
            if reason := self._hangs(part):
                part.ended_for = reason
                self._bury(part)

    def _bury(self, part: Part) -> None:
        reason = part.bury()
        if part is self.engine and not self.leaving and (stub := self.stubs.get(triton_server.MODELS[0])):
            self.leaving = stub, time.monotonic()
        if part is self.triton:
            triton_server.clean_up()
        self.say(f"{reason}. Starting it again")
        self.restarts[part.name] += 1
        self._write_status()
        self._note("died", part=part.name, reason=reason)

    def _hangs(self, part: Part) -> str:
        """Why `part` must be ended though its process is there; "" where it need not."""
        if part is self.triton and (reason := self._lacks_a_stub() or self._keeps_a_stub()):
            return reason
        if part.silence > SILENCE_STOPPED and any(map(is_stopped, part.family)):
            return "it was stopped"
        if part.is_up and (part.stillness > SILENCE or part.silence > SILENCE_BUSY):
            return f"no sign of life for {part.silence:.1f} s"
        late = part is self.triton and self.engine.is_up and time.monotonic() - self.engine.up_at > START
        return f"it does not answer {START:.0f} s after the engine" if late and part.silence > START else ""

    def _lacks_a_stub(self) -> str:
        if not self.triton.is_up or (len(self.stubs) == len(BEATS) and all(map(lives, self.stubs.values()))):
            return ""
        self.stubs = {}
        for process in descendants(self.triton.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                if lives(process) and (model := triton_server.model_of(process.cmdline())):
                    self.stubs[model] = process
        # A stub that has lost its engine unloads its model, and another one comes.
        needed = triton_server.MODELS if self.is_loaded and self.engine.is_up else triton_server.MODELS[1:]
        missing = [model for model in needed if model not in self.stubs]
        return f"the stub of {missing[0]} has died" if missing else ""

    def _keeps_a_stub(self) -> str:
        """Of a model that has been unloaded. Triton 2.51 does now and then, for ever, where a gRPC stream was cancelled
        just then. It is ended while the next engine starts, when it has nothing to do."""
        if not self.leaving:
            return ""
        stub, since = self.leaving
        if not lives(stub):
            self.leaving = None
        elif time.monotonic() - since > LEAVE:
            return "it kept a stub that had lost its engine"
        return ""

    async def _hear_engine(self) -> None:
        """Take every beat of the engine, on a connection of our own."""
        reader, writer = await asyncio.open_unix_connection(self.state.engine, limit=protocol.MAX_LINE)
        try:
            while line := await reader.readline():
                beat = protocol.decode(line).get("beat")
                if beat is None:
                    continue
                if not self.engine.is_up or beat["tokens"] != self.beat.get("tokens"):
                    self.generated_at = time.monotonic()
                self.beat = beat
                self.engine.answered()
        finally:
            writer.close()

    async def _ask_triton(self) -> None:
        """Triton lives while it answers and its stubs have moved since they last did; of a model that is loaded."""
        await asyncio.sleep(2 * TICK)
        self.is_loaded = (await self.http.get("/v2/models/gemma/ready", timeout=1)).status_code == 200
        if not self.triton.is_up:
            if not self.is_loaded:
                return
            # The first question to the catalogue tells it that Triton's interface may be used from now on.
            await self.http.post("/v2/models/adapters/generate", json={"name": ""}, timeout=5)
        expected = BEATS if self.is_loaded else BEATS[1:]
        moved = {beat: (self.folder / beat).stat().st_mtime_ns for beat in expected}
        if all(self.moved.get(beat) != at for beat, at in moved.items()):
            self.moved |= moved
            self.triton.answered()

    async def _ask_door(self) -> None:
        await asyncio.sleep(4 * TICK)
        asked = await self.http.get(f"http://{self.here}:{self.options.door_port}/metrics", timeout=1)
        if asked.status_code == 200:
            self.door.answered()

    async def _probe(self) -> None:
        """Generate a token through Triton where nothing else has shown for a while that this works."""
        await asyncio.sleep(1)
        for part in self.parts:
            part.shorten_log()
        idle = time.monotonic() - self.generated_at
        before = [part.is_up and part.up_at for part in (self.engine, self.triton)]
        if idle < PROBE_EVERY or not all(before) or self.ending.is_set():
            return
        body = {"text_input": "Hello", "parameters": {"max_tokens": 1, "temperature": 0}}
        try:
            answer = await self.http.post("/v2/models/gemma/generate", json=body, timeout=PROBE_DEADLINE)
            from_engine = any(f"{code}: " in answer.text for code in (protocol.BUSY, protocol.UNAVAILABLE))
            problem = "" if answer.status_code == 200 or from_engine else answer.text[:200]
        except httpx.HTTPError as error:
            is_slow = self.beat.get("running") or self.beat.get("waiting")  # but the engine has been asked
            problem = "" if is_slow else type(error).__name__
        if not problem:
            self.generated_at = time.monotonic()
        elif before == [part.is_up and part.up_at for part in (self.engine, self.triton)] and not self.ending.is_set():
            self.triton.ended_for = f"it could not generate ({problem})"
            self._bury(self.triton)

    # --- telling ------------------------------------------------------------------------------------------------------

    def _write_status(self) -> None:
        options = self.options
        self.state.write(
            ServerStatus(
                pid=os.getpid(),
                host=options.host,
                http_port=options.http_port,
                grpc_port=options.grpc_port,
                metrics_port=options.metrics_port,
                door_port=options.door_port,
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
        await asyncio.sleep(TICK)  # there is nobody, or nobody any more


def _event_log(file: Path) -> logging.Logger:
    handler = logging.handlers.RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("events")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    return log
