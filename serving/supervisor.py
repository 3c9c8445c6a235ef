"""The supervisor: starts engine, Triton and door, knows when one of them has died or hangs, and starts it again.

What it watches, ten times a second:

    engine   its process, and the beats that its generating loop sends over the socket
    Triton   its process and its Python stubs', the beats that the stubs' answering threads leave, `/v2/health/live`;
             and where nothing has been generated for a while, a real generation of one token through Triton
    door     its process

A part that is silent for too long is killed; the kernel then ends its connections, so that whoever waits is told. Triton
and its stubs go together: a client whose stub has died would wait for ever. The engine goes alone: the stub answers
everybody who waits and reports "not ready" until the engine is back. Every part ends with the supervisor, however that
ends, and what it leaves in shared memory is removed.
"""

import asyncio
import contextlib
import ctypes
import hashlib
import json
import logging
import logging.handlers
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from serving import protocol
from serving.state import ENGINE_SOCKET, State

TICK = 0.1  # seconds
SILENCE = 1.5  # seconds without a sign of life after which a part hangs; the engine's: or ten of its steps
STEPS = 10
PROBE_EVERY = 10.0  # seconds without a finished generation before one is asked for
PROBE_DEADLINE = 5.0
DRAIN = 7.0  # seconds that requests in flight have to end after SIGTERM, of 10 in all
DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before the next start of a part that keeps dying
STEADY = 5.0  # seconds a part must have answered to have its deaths forgotten
START = 30.0  # seconds that Triton may take once the engine answers
LOG_BYTES = 10 << 20
ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None)


class StartError(Exception):
    """What keeps the server from starting; its text says what to do."""


@dataclass(frozen=True)
class Options:
    """See `python -m serving --help`."""

    folder: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    door_port: int = 9000
    log_text: bool = False
    engine: tuple[str, ...] = ()  # arguments of serving.engine


@dataclass
class Part:
    """A process of the server, started as often as it must be.

    Attributes:
        silence: seconds since its last sign of life, of those that the supervisor itself has been awake.
        is_up: whether it has answered since its last start, `up_at` when it first did, on the monotonic clock.
    """

    name: str
    command: list[str]
    folder: Path  # its working directory
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    expendable: bool = False  # the first to go where the machine's memory ends
    process: subprocess.Popen | None = None
    is_up: bool = False
    silence: float = 0.0
    up_at: float = 0.0
    start_at: float = 0.0
    deaths: int = 0  # in a row
    killed_for: str = ""

    def start(self) -> None:
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with(os.getpid(), self.expendable),
            )  # fmt: skip
        self.is_up, self.silence, self.killed_for = False, 0.0, ""

    def answered(self) -> None:
        """It has shown that it lives."""
        if not self.is_up:
            self.is_up, self.up_at = True, time.monotonic()
        self.silence = 0.0

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """End it and every process of its session at once, and wait until they are gone."""
        if self.process is None:
            return
        family = _descendants(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _reap(family)

    def last_words(self) -> str:
        """The last line of its log that says something."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 4000))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")[:300]


def _end_with(supervisor: int, expendable: bool) -> Callable[[], None]:
    def between_fork_and_exec() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # it died in between
            os._exit(1)
        if expendable:
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123
                score.write("500")

    return between_fork_and_exec


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _reap(family: list[psutil.Process]) -> None:
    """Take the exit statuses of a killed part's children, which are now ours (we are their subreaper)."""
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)


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
        self.prefix = f"triton_gemma_{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}_"
        self.restarts = {"engine": 0, "triton": 0, "door": 0}
        self.starts = 0  # of Triton
        self.beat: dict[str, Any] = {}
        self.generated_at = time.monotonic()
        self.stubs: dict[str, psutil.Process] = {}
        self.beats: dict[str, int] = {}  # file: when it was touched
        self.ended = asyncio.Event()
        self.out_of_memory = _kills_for_memory()
        self.http = httpx.AsyncClient(
            base_url=f"http://{_reachable(options.host)}:{options.http_port}", trust_env=False
        )
        self.engine = Part("engine", [
            sys.executable, "-u", "-m", "serving.engine", "--base", str((options.folder / "base").resolve()),
            "--adapters", str((options.folder / "adapters").resolve()), "--socket", ENGINE_SOCKET, *options.engine,
        ], self.folder, self.folder / "engine.log", {"PYTHONPATH": str(ROOT)}, expendable=True)  # fmt: skip
        self.triton = self._triton()
        self.door = Part("door", [
            sys.executable, "-u", "-m", "serving.door", "--host", options.host, "--port", str(options.door_port),
            "--triton", f"{_reachable(options.host)}:{options.grpc_port}",
        ], ROOT, self.folder / "door.log")  # fmt: skip
        self.parts = [self.engine, self.triton]
        if (ROOT / "serving" / "door").is_dir() or (ROOT / "serving" / "door.py").is_file():
            self.parts.append(self.door)

    # --- starting -----------------------------------------------------------------------------------------------------

    def _triton(self) -> Part:
        """
        Raises:
            StartError: nvidia-pytriton is not installed for this Python.
        """
        options = self.options
        site = Path(sysconfig.get_path("purelib"))
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        server = site / "pytriton" / "tritonserver"
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            raise StartError(f"{server} has no Triton for Python {version}; install it: make serve-env")
        # Triton looks for the stub beside the backend.
        backend = self.folder / "backends" / "python"
        shutil.rmtree(backend.parent, ignore_errors=True)
        backend.mkdir(parents=True)
        for file in (*(server / "backends" / "python").iterdir(), stub):
            shutil.copy2(file, backend)
        # Who would change models, shared memory or logs from outside must know a key that no header can hold.
        locked = "model-repository,shared-memory,trace,logging:not for\nanybody=locked\nfor good"
        ports = {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
        command = [
            str(server / "bin" / "tritonserver"), f"--model-repository={(options.folder / 'repository').resolve()}",
            f"--backend-directory={backend.parent}", "--disable-auto-complete-config", "--model-control-mode=explicit",
            "--load-model=gemma", "--load-model=adapters", f"--exit-timeout-secs={DRAIN + 2:.0f}", "--log-info=false",
            *(f"--{name}-port={port}" for name, port in ports.items()),
            *(f"--{name}-address={options.host}" for name in ports), "--allow-gpu-metrics=false",
            f"--http-restricted-api={locked}", f"--grpc-restricted-protocol={locked}",
        ]  # fmt: skip
        libraries = [sysconfig.get_config_var("LIBDIR"), str(site / "nvidia_pytriton.libs"),
                     *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]  # fmt: skip
        return Part("triton", command, self.folder, self.folder / "triton.log", {
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}",  # the stub's Python is the one found here
            "LD_LIBRARY_PATH": ":".join(libraries), "SERVING_LOG_TEXT": "1" if options.log_text else "0",
        })  # fmt: skip

    def _start(self, part: Part) -> None:
        if part is self.engine:
            (self.folder / ENGINE_SOCKET).unlink(missing_ok=True)
        if part is self.triton:
            self._clean_shared_memory()
            self.stubs, self.beats, self.starts = {}, {}, self.starts + 1
            region = f"--backend-config=python,shm-region-prefix-name={self.prefix}{self.starts}_"
            part.command = [*(word for word in part.command if not word.startswith("--backend-config")), region]
        part.start()
        self._note("started", part=part.name, pid=part.process.pid if part.process else None)

    def _clean_shared_memory(self) -> None:
        for region in Path("/dev/shm").glob(f"{self.prefix}*"):
            region.unlink(missing_ok=True)

    def _end_leftovers(self) -> None:
        """End stubs of an earlier server of this folder, which outlive it where they were stopped (SIGSTOP)."""
        for process in psutil.process_iter(["cmdline"]):
            if any(self.prefix in word for word in process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    async def run(self) -> None:
        """Start everything, keep it alive, and end it on SIGTERM or SIGINT.

        Raises:
            StartError: a port is taken, or a part ends before it has answered for the first time.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_end)
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._check_ports()
        self._end_leftovers()
        self._clean_shared_memory()
        self._write_status()
        watchers: list[Callable[[], Awaitable[None]]] = [self._hear_engine, self._ask_triton, self._probe]
        tasks = [asyncio.create_task(_forever(watcher)) for watcher in watchers]
        try:
            self._start(self.engine)
            self._start(self.triton)  # whose model waits for the engine
            await self._until_ready()
            if self.door in self.parts and not self.ended.is_set():
                self._start(self.door)
            while not self.ended.is_set():
                self._tick()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.ended.wait(), TICK)
            await self._drain()
        finally:
            for task in tasks:
                task.cancel()
            for part in reversed(self.parts):
                part.kill()
            await self.http.aclose()
            self._clean_shared_memory()
            for file in (ENGINE_SOCKET, "gemma.beat", "adapters.beat"):
                (self.folder / file).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "backends", ignore_errors=True)
            self._note("ended")

    def _check_ports(self) -> None:
        options = self.options
        named = {"--http-port": options.http_port, "--grpc-port": options.grpc_port,
                 "--metrics-port": options.metrics_port, "--door-port": options.door_port}  # fmt: skip
        if len(set(named.values())) < len(named):
            raise StartError(f"each needs a port of its own: {', '.join(f'{k} {v}' for k, v in named.items())}")
        for name, port in named.items():
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    trial.bind((options.host, port))
                except OSError as error:
                    raise StartError(f"port {port} of {options.host} cannot be had ({error.strerror}). End what has it, "
                                     f"or take another: make serve ARGS=\"{name} …\"") from None  # fmt: skip

    async def _until_ready(self) -> None:
        """
        Raises:
            StartError: a part has ended; with its last words.
        """
        while not (self.engine.is_up and self.triton.is_up) and not self.ended.is_set():
            for part in (self.engine, self.triton):
                if not part.is_running:
                    raise StartError(f"{self._why_it_ended(part)}. All it said: {part.log}")
            await asyncio.sleep(TICK)

    # --- watching -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Look at every part once."""
        now = time.monotonic()
        for part in self.parts:
            if part.process is None:
                if now >= part.start_at:
                    self._start(part)
                continue
            part.silence += TICK
            if not part.is_running:
                self._bury(part)
            elif part is self.door:
                part.answered()
            elif reason := self._hangs(part):
                part.killed_for = reason
                self._bury(part)

    def _hangs(self, part: Part) -> str:
        """Why `part` must be ended though its process is there; "" where it need not."""
        if part.silence > SILENCE and _is_stopped(part):
            return "it was stopped"
        if part is self.engine and part.is_up:
            patience = max(SILENCE, STEPS * float(self.beat.get("step", 0)))
            return f"no beat for {part.silence:.1f} s" if part.silence > patience else ""
        if part is self.triton:
            return self._triton_hangs(part)
        return ""

    def _triton_hangs(self, part: Part) -> str:
        assert part.process
        if not part.is_up:
            late = self.engine.is_up and time.monotonic() - self.engine.up_at > START and part.silence > START
            return f"it did not answer {START:.0f} s after the engine" if late else ""
        if any(not _lives(stub) for stub in self.stubs.values()) or len(self.stubs) < 2:
            # Where the engine has ended, the stub of its model ends too, and another one comes.
            self.stubs = {_model_of(process): process for process in _descendants(part.process.pid)}
            if self.engine.is_up and (missing := {"gemma", "adapters"} - self.stubs.keys()):
                return f"the stub of {missing.pop()} has died"
        return f"no answer for {part.silence:.1f} s" if part.silence > SILENCE else ""

    def _bury(self, part: Part) -> None:
        part.kill()
        steady = part.is_up and time.monotonic() - part.up_at > STEADY
        part.deaths = 1 if steady else part.deaths + 1
        delay = DELAYS[min(part.deaths - 1, len(DELAYS) - 1)]
        again = (
            "starting it again" if not delay else f"{part.deaths} times in a row; starting it again in {delay:.0f} s"
        )
        reason = self._why_it_ended(part)
        self.say(f"{reason}: {again}")
        self.restarts[part.name] += 1
        self._write_status()
        self._note("died", part=part.name, reason=reason, in_a_row=part.deaths)
        part.process, part.is_up, part.start_at = None, False, time.monotonic() + delay

    def _why_it_ended(self, part: Part) -> str:
        code = part.process.returncode if part.process else None
        words = part.last_words()
        if part.killed_for:
            return f"{part.name} was ended, {part.killed_for}"
        kills, self.out_of_memory = self.out_of_memory, _kills_for_memory()
        memory = any(sign in words for sign in ("MemoryError", "can't allocate memory", "not enough memory",
                                                "out of memory"))  # fmt: skip
        if memory or (code == -signal.SIGKILL and self.out_of_memory > kills):
            return (f"{part.name} ran out of memory and was ended; give it less to hold, "
                    f'ARGS="--max-tokens-in-cache …", or the machine more')  # fmt: skip
        if code is not None and code < 0:
            return f"{part.name} was ended by {signal.Signals(-code).name}"
        return f"{part.name} ended with code {code}: {words}"

    async def _hear_engine(self) -> None:
        """Take every beat of the engine, on a connection of our own."""
        try:
            reader, writer = await asyncio.open_unix_connection(self.folder / ENGINE_SOCKET, limit=protocol.MAX_LINE)
        except OSError:
            await asyncio.sleep(TICK)
            return
        try:
            while line := await reader.readline():
                beat = protocol.decode(line).get("beat")
                if beat is not None:
                    if sum(beat["tokens"].values()) != sum(self.beat.get("tokens", {}).values()):
                        self.generated_at = time.monotonic()
                    if not self.engine.is_up:
                        self.generated_at = time.monotonic()
                    self.beat = beat
                    self.engine.answered()
        finally:
            writer.close()

    async def _ask_triton(self) -> None:
        """Triton lives while it says so and both stubs have moved since the last look."""
        await asyncio.sleep(2 * TICK)
        try:
            asked = await self.http.get("/v2/health/live" if self.triton.is_up else "/v2/models/gemma/ready", timeout=1)
            if not self.triton.is_up and asked.status_code == 200:
                # The first question to the catalogue tells it that Triton's interface may be used from now on.
                asked = await self.http.post("/v2/models/adapters/generate", json={"name": ""}, timeout=1)
        except httpx.HTTPError:
            return
        moved = {name: (self.folder / f"{name}.beat").stat().st_mtime_ns for name in ("gemma", "adapters")}
        if asked.status_code == 200 and all(self.beats.get(name) != at for name, at in moved.items()):
            self.beats = moved
            self.triton.answered()

    async def _probe(self) -> None:
        """Generate a token through Triton where nothing else has shown for a while that this works."""
        await asyncio.sleep(1)
        idle = time.monotonic() - self.generated_at
        if not (self.engine.is_up and self.triton.is_up) or idle < PROBE_EVERY or self.beat.get("running"):
            return
        began, asked = time.monotonic(), (self.engine.up_at, self.triton.up_at)
        body = {"text_input": "Hello", "parameters": {"max_tokens": 1, "temperature": 0}}
        try:
            answer = await self.http.post("/v2/models/gemma/generate", json=body, timeout=PROBE_DEADLINE)
            problem = "" if answer.status_code == 200 else answer.text[:200]
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__} after {time.monotonic() - began:.1f} s"
        if not problem or "busy:" in problem:
            self.generated_at = time.monotonic()
        elif (
            not self.ended.is_set()
            and asked == (self.engine.up_at, self.triton.up_at)
            and self.engine.is_up
            and self.triton.is_up
        ):
            self.triton.killed_for = f"it could not generate ({problem})"
            self._bury(self.triton)

    # --- ending -------------------------------------------------------------------------------------------------------

    def _asked_to_end(self) -> None:
        if self.ended.is_set():  # asked twice
            for part in self.parts:
                part.kill()
        self.ended.set()

    async def _drain(self) -> None:
        """Let requests in flight end, for `DRAIN` seconds; then tell those who still wait, and end."""
        running = int(self.beat.get("running", 0)) + int(self.beat.get("waiting", 0))
        self.say(f"Ending{f', after {running} requests, in {DRAIN:.0f} s at most' if running else ''}")
        self._note("draining", running=running)
        for part in (self.door, self.triton):
            if part.is_running and part.process:
                part.process.terminate()
        until = time.monotonic() + DRAIN
        while self.triton.is_running and time.monotonic() < until:
            await asyncio.sleep(TICK)
        self.engine.kill()  # the stub answers who still waits
        until = time.monotonic() + 2
        while self.triton.is_running and time.monotonic() < until:
            await asyncio.sleep(TICK)

    # --- telling ------------------------------------------------------------------------------------------------------

    def _write_status(self) -> None:
        options = self.options
        self.state.write({
            "pid": os.getpid(), "host": options.host, "http_port": options.http_port, "grpc_port": options.grpc_port,
            "metrics_port": options.metrics_port, "door_port": options.door_port,
            "base": (options.folder / "base").resolve().name, "restarts": self.restarts,
        })  # fmt: skip

    def _note(self, event: str, **about: Any) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.events.info(json.dumps({"time": at, "event": event, **about}, ensure_ascii=False))


async def _forever(watcher: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await watcher()
        except (OSError, ValueError, protocol.RequestError):
            await asyncio.sleep(TICK)


def _is_stopped(part: Part) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return part.process is not None and psutil.Process(part.process.pid).status() == psutil.STATUS_STOPPED
    return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _model_of(stub: psutil.Process) -> str:
    """Which model a child of Triton runs: `…/repository/<model>/1/model.py` in its command."""
    try:
        found = next((Path(word) for word in stub.cmdline() if word.endswith("/1/model.py")), None)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
    return found.parent.parent.name if found else ""


def _kills_for_memory() -> int:
    """How many processes the kernel has killed for want of memory, on this machine or in this container."""
    total = 0
    for file in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")):
        with contextlib.suppress(OSError):
            total += sum(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("oom_kill "))
    return total


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _event_log(file: Path) -> logging.Logger:
    handler = logging.handlers.RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("events")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    return log
