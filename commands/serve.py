"""Serve what `commands.prepare_serving` prepared: engine, Triton and OpenAI-compatible gateway under a supervisor.

    python -m commands.serve                                 (what `make serve` calls, in the serving environment)
    python -m commands.serve grpc_port=9001 threads=4

It stays in the foreground; Ctrl-C or SIGTERM lets requests in flight end, for some seconds, and then ends everything.
Where a server runs from the same folder already, its adapters are looked at and this command ends.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Literal, Self

import psutil
from pydantic import Field, field_validator, model_validator
from rich.console import Console

from core.arguments import Arguments, parse
from core.artifacts import EngineStats, ServerStatus
from core.errors import UserError, run
from core.files import read_json
from core.prompt import PROMPT_FILE
from serving.client import BASE, Adapter
from serving.server_options import LOOPBACK, ServerOptions, checked_origin
from serving.state import State
from serving.supervisor import Supervisor

ENGINE_OPTIONS = ("threads", "max_waiting", "max_tokens_in_cache", "dtype")
PATIENCE = 15.0  # seconds for a running server to take a new adapter
ON_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
HEARD = "Other machines reach port {gateway}, the gateway{key}"
KEY = "SERVING_API_KEY"  # the environment variable
KEYLESS = f": everybody who can may use the model, since {KEY} is not set"
EXPOSED = {
    "grpc": "warning: expose=grpc lets other machines reach Triton's gRPC on port {grpc}, which asks for no key",
    "http": "warning: expose=http lets other machines reach Triton's own HTTP on port {http}, which asks for no key. "
    "Every Triton before 25.07, such as pip's 2.51 of 2024, has critical flaws in it (NVIDIA, August 2025: "
    "SECURITY.md). Port {gateway} answers the same requests to /v2/models/gemma after checking them",
}


class Options(Arguments):
    folder: Path = Field(Path("exports/serve"), description="what to serve")
    host: str = Field(LOOPBACK, description="address of the gateway; 0.0.0.0 lets other machines in")
    expose: list[Literal["grpc", "http"]] = Field(
        [], description="ports of Triton that listen on `host` too, without a key; otherwise only this machine has them"
    )
    http_port: int = Field(8000, ge=1, le=65535, description="Triton's HTTP")
    grpc_port: int = Field(8001, ge=1, le=65535, description="Triton's gRPC")
    metrics_port: int = Field(8002, ge=1, le=65535, description="Triton's metrics; the gateway has them too")
    gateway_port: int = Field(9000, ge=1, le=65535, description="the OpenAI-compatible gateway")
    threads: int | None = Field(None, ge=1, description="of the engine; by default the machine's cores")
    max_waiting: int | None = Field(None, ge=1, description="requests in the queue before others are told 'busy'")
    max_tokens_in_cache: int | None = Field(None, ge=1, description="tokens of all requests: bounds the memory")
    dtype: str | None = Field(None, description="of the engine's weights: bfloat16, float32 or int8")
    keep_alive: int | None = Field(
        None, ge=1, description="seconds that the gateway keeps a connection without a request; by default 75"
    )
    origins: list[str] = Field(
        [], description="of web pages that may call the gateway from a browser (CORS), as https://app.example.org"
    )
    log_text: bool = Field(False, description="prompts and answers too in state/requests.jsonl")

    _origins = field_validator("origins")(lambda origins: [checked_origin(origin) for origin in origins])

    @model_validator(mode="after")
    def _exposes_something(self) -> Self:
        if self.expose and self.host in ON_THIS_MACHINE:
            word = ",".join(self.expose)
            raise ValueError(f"expose={word} opens nothing to others while host is {self.host}; add host=0.0.0.0")
        return self


def main(argv: list[str]) -> None:
    given = parse(Options, argv)
    engine = [
        f"--{name.replace('_', '-')}={value}" for name in ENGINE_OPTIONS if (value := getattr(given, name)) is not None
    ]
    options = ServerOptions(
        given.folder,
        given.host,
        given.http_port,
        given.grpc_port,
        given.metrics_port,
        given.gateway_port,
        tuple(given.expose),
        tuple(given.origins),
        given.log_text,
        given.keep_alive,
        tuple(engine),
        given.model_dump(exclude={"folder"}),
    )
    state, console = State(options.folder / "state"), Console(highlight=False, soft_wrap=True)
    if not (options.folder / "repository" / "gemma" / "1" / "model.py").exists():
        raise UserError(f"{options.folder} holds nothing that this engine serves; make it: make serve TASK=…")
    if not state.take():
        joined(given, state, console)
    else:
        asyncio.run(serve(options, state, console))


async def serve(options: ServerOptions, state: State, console: Console) -> None:
    adapters = [path.name for path in sorted((options.folder / "adapters").iterdir())]
    base = (options.folder / "base").resolve().name

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, or a reader that has left
            print(line, flush=True)

    say(f"Serving {base} with {', '.join(adapters)}" if adapters else f"Serving {base} alone")
    if options.host not in ON_THIS_MACHINE:
        ports = {name: port for name, (_, port) in options.listening.items()}
        say(HEARD.format(**ports, key="" if os.environ.get(KEY) else KEYLESS))
        for name in options.expose:
            say(EXPOSED[name].format(**ports))
    check_ports(options)
    supervisor = Supervisor(options, state, say)
    running = asyncio.create_task(supervisor.run())
    began = time.monotonic()
    with console.status("Loading"):
        while not running.done() and not supervisor.is_up:
            await asyncio.sleep(0.1)
    if not running.done():
        say(f"Ready after {time.monotonic() - began:.1f} s. Ctrl-C ends it.")
        if memory := engine_of(state).memory:
            say(in_words(memory))
        say(addresses(supervisor.status, options.folder, adapters))
    await running
    say("Ended.")


def check_ports(options: ServerOptions) -> None:
    """
    Raises:
        UserError: two ports are equal, or one is taken.
    """
    named = {f"{name}_port": address for name, address in options.listening.items()}
    if len({port for _, port in named.values()}) < len(named):
        raise UserError(f"every port must be different, not {', '.join(f'{k}={v}' for k, (_, v) in named.items())}")
    for name, (host, port) in named.items():
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((host, port))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"port {port} of {host} cannot be used ({reason}). Stop the program that uses it, or "
                    f"choose another port: make serve ARGS={name}=PORT"
                ) from None


def joined(given: Options, state: State, console: Console) -> None:
    """Wait until the running server has every adapter of its folder, and say so.

    Raises:
        UserError: it has not, after a while; or it runs with other options than those given.
    """
    status = state.read()
    for name in sorted(given.model_fields_set - {"folder"}):
        asked, runs = (json.loads(json.dumps(value)) for value in (getattr(given, name), status.options.get(name)))
        if asked != runs:
            raise UserError(
                f"a server runs from {given.folder} already (process {status.pid}), and not with {name}={asked} but "
                f"{'its default' if runs is None else runs}, which cannot change while it runs. Stop it first"
            )
    if (key := os.environ.get(KEY)) and key != key_of(status.pid):
        raise UserError(
            f"a server runs from {given.folder} already (process {status.pid}), and not with this {KEY}, which cannot "
            "change while it runs. Stop it first"
        )
    wanted = sorted(path.name for path in (given.folder / "adapters").iterdir())
    until = time.monotonic() + PATIENCE
    while missing := sorted({*wanted} - {*(found := engine_of(state)).adapters}):
        reason = found.broken.get(missing[0])
        if reason or time.monotonic() > until:
            raise UserError(
                f"the running server (process {status.pid}) has not taken {missing[0]}: "
                f"{reason or f'what it said is in {state.folder}'}"
            )
        time.sleep(0.25)
    what = ", ".join(wanted) or "the base"
    console.print(f"A server is running already (process {status.pid}); it serves {what}.", markup=False)
    console.print(addresses(status, given.folder, wanted), markup=False)


def key_of(pid: int) -> str:
    """The keys that the running server was given; "" for none, or where they cannot be seen."""
    try:
        return psutil.Process(pid).environ().get(KEY, "")
    except psutil.Error:
        return ""


def engine_of(state: State) -> EngineStats:
    """What the running engine says of itself; an idle one without adapters while it is being started."""
    try:
        return state.ask_engine(5)
    except OSError:
        return EngineStats(running=0, waiting=0, kv_tokens=0, kv_capacity=0)


def in_words(memory: dict[str, int]) -> str:
    """What the engine says of its memory."""
    words = f"Keys and values take {memory['keys_and_values'] / 1e9:.1f} GB when the cache is full"
    if table := memory.get("table_in_file"):
        words += f"; the per-layer table of {table / 1e9:.1f} GB stays in its file, mapped, and is read by rows"
    return f"{words}."


def addresses(status: ServerStatus, folder: Path, adapters: list[str]) -> str:
    gateway = f"http://{status.host}:{status.gateway_port}"
    grpc = status.host if "grpc" in status.options.get("expose", []) else LOOPBACK
    return (
        f"  OpenAI   {gateway}/v1\n"
        f"  Triton   {gateway}/v2/models/gemma/generate\n"
        f"  gRPC     {grpc}:{status.grpc_port}\n"
        f"  metrics  {gateway}/metrics and {gateway}/triton/metrics\n"
        f"Try: curl {gateway}/v1/chat/completions -d '{example(folder, adapters)}'"
    )


def example(folder: Path, adapters: list[str]) -> str:
    """A question to the first adapter, by the gateway, which asks it in the prompt of its task."""
    name, question = adapters[0] if adapters else BASE.name, "Hello!"
    try:
        entry = read_json(folder / "adapters" / name / "serving.json")
        adapter = Adapter.read({**entry, "prompt": read_json(folder / "adapters" / name / PROMPT_FILE)})
        question = adapter.prompt.fields.get(adapter.field or "") or question
    except (UserError, ValueError, KeyError, TypeError):
        pass  # the base has none, and a broken adapter is told of elsewhere
    asked = json.dumps({"model": name, "messages": [{"role": "user", "content": question}]})
    return asked.replace("'", r"\u0027")  # for a shell's quotation marks


if __name__ == "__main__":
    run(main)
