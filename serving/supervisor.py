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
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from core.artifacts import ServerStatus
from core.errors import UserError
from serving import protocol, triton_server
from serving.processes import LOG_BYTES, ManagedProcess, adopt_orphans, descendants, is_stopped, lives
from serving.record_file import record_log
from serving.server_options import ServerOptions
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
MOST_SAID = 20  # different errors of the supervisor's own
LAST_WORDS = 0.8  # seconds each for the engine, Triton and the gateway to deliver the last responses
HEARTBEATS = [f"{model}.heartbeat" for model in triton_server.MODELS]
ROOT = Path(__file__).resolve().parent.parent


class Supervisor:
    """One server. `run` returns when it has ended.

    Args:
        state: the server's state folder, whose lock the caller holds.
        say: shows a line to the user.
    """

    def __init__(self, options: ServerOptions, state: State, say: Callable[[str], None]) -> None:
        self.options, self.state, self.say = options, state, say
        self.folder = state.folder.resolve()
        self.events = record_log("events", self.folder / "events.jsonl", LOG_BYTES, 1)
        self.unwritten = ""  # since when, and why, status.json could not be written
        self.is_status_due = False
        self.said: set[str] = set()  # errors of the supervisor's own
        self.shared_memory = f"triton_gemma_{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}_"
        self.starts = 0  # of Triton
        self.heartbeat: dict[str, Any] = {}  # the engine's latest
        self.generated_at = time.monotonic()
        self.stubs: dict[str, psutil.Process] = {}
        self.leaving: tuple[psutil.Process, float] | None = None  # the stub that has lost its engine, and when
        self.moved: dict[str, int] = {}  # heartbeat file of a stub: its modification time in ns
        self.is_loaded = False  # whether Triton reports the model ready
        self.ending = asyncio.Event()
        self.http = httpx.AsyncClient(base_url=f"http://{options.from_here('http')}", trust_env=False)
        texts = {"SERVING_LOG_TEXT": "1" if options.log_text else "0"}
        self.engine = ManagedProcess(
            "engine",
            options.engine_command(),
            self.folder,
            self.folder / "engine.log",
            {"PYTHONPATH": str(ROOT)},
            expendable=True,
        )
        self.triton = ManagedProcess(
            "triton", [], self.folder, self.folder / "triton.log", triton_server.environment() | texts
        )
        self.gateway = ManagedProcess("gateway", options.gateway_command(), ROOT, self.folder / "gateway.log", texts)
        self.processes = [self.engine, self.triton, self.gateway]
        self.restarts = {process.name: 0 for process in self.processes}

    # --- from start to end --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start everything, keep it running, and end it on SIGTERM or SIGINT.

        Raises:
            UserError: Triton is not installed, or a process ended before everything was up.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._asked_to_end)
        adopt_orphans()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection of a client needs one
        try:
            triton_server.lay_out_backend(self.folder / "backends")
        except triton_server.NoTriton as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"Triton's backend cannot be copied to {self.folder} ({error.strerror})") from None
        self._end_leftovers()
        self._write_status()
        watchers = [self._receive_heartbeats, self._ask_triton, self._ask_gateway, self._probe]
        tasks = [asyncio.create_task(self._forever(watcher)) for watcher in watchers]
        try:
            for process in self.processes:  # all at once; Triton's model waits for the engine
                self._start(process)
            await self._until_ready()
            while not self.ending.is_set():
                try:
                    self._tick()
                except Exception as error:
                    self._survive(error)
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
            listening = self.options.listening
            process.command = triton_server.command(
                (self.options.folder / "repository").resolve(),
                self.folder / "backends",
                {name: listening[name] for name in ("http", "grpc", "metrics")},
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
        await self._ended(self.engine, DRAIN)
        self.engine.ask_to_end()  # the second time: it tells those who still wait
        await self._ended(self.engine, LAST_WORDS)
        self.engine.kill()  # or the stub does
        await asyncio.sleep(LAST_WORDS)
        await self._ended(self.gateway, LAST_WORDS)

    async def _ended(self, process: ManagedProcess, seconds: float) -> None:
        """Wait until `process` has ended, at most `seconds`."""
        until = time.monotonic() + seconds
        while process.is_running and time.monotonic() < until:
            await asyncio.sleep(TICK)

    # --- watching -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Check every process once."""
        for process in self.processes:
            if process.popen is None:
                if time.monotonic() >= process.start_at:
                    process.start_at = time.monotonic() + 1  # where it cannot be started: no memory, no descriptors
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
        await self.http.get(f"http://{self.options.from_here('gateway')}/metrics", timeout=1)
        self.gateway.answered()  # it lives, even if it refuses another connection from this address

    async def _probe(self) -> None:
        """Generate a token through Triton where none has been generated for a while."""
        await asyncio.sleep(1)
        for process in self.processes:
            process.shorten_log()
        if self.is_status_due:
            self._write_status()
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

    @property
    def status(self) -> ServerStatus:
        options = self.options
        return ServerStatus(
            pid=os.getpid(),
            host=options.host,
            http_port=options.http_port,
            grpc_port=options.grpc_port,
            metrics_port=options.metrics_port,
            gateway_port=options.gateway_port,
            base=(options.folder / "base").resolve().name,
            options=dict(options.given),
            restarts=self.restarts,
            unwritten=self.unwritten,
        )

    def _write_status(self) -> None:
        """Write status.json. Where that fails it is said once, and tried again every second."""
        try:
            self.state.write(self.status)
        except OSError as error:
            if not self.is_status_due:
                at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                self.unwritten = f"{at}: {error.strerror}"
                self.say(f"{self.folder} cannot be written ({error.strerror}). Serving goes on, and its logs have gaps")
            self.is_status_due = True
        else:
            if self.is_status_due:
                self.say(f"{self.folder} can be written again")
            self.is_status_due = False

    def _note(self, event: str, **about: Any) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.events.info(json.dumps({"time": at, "event": event, **about}, ensure_ascii=False))

    async def _forever(self, watcher: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await watcher()
            except (OSError, ValueError, httpx.HTTPError, protocol.RequestError):
                pass  # nothing answers yet, or no longer
            except Exception as error:
                self._survive(error)
            await asyncio.sleep(TICK)

    def _survive(self, error: Exception) -> None:
        """Say an error of the supervisor's own once. It must not end, as all that it watches would end with it."""
        sentence = f"{type(error).__name__}: {error}"
        if sentence not in self.said and len(self.said) < MOST_SAID:
            self.said.add(sentence)
            self.say(f"The supervisor failed ({sentence}) and goes on")
            self._note("failed", error=sentence, traceback=traceback.format_exception(error))
