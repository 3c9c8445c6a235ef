"""Serve what `commands.prepare_serving` prepared: engine, Triton and OpenAI-compatible gateway under a supervisor.

    python -m commands.serve                                 (what `make serve` calls, in the serving environment)
    python -m commands.serve grpc_port=9001 threads=4

It stays in the foreground; Ctrl-C or SIGTERM lets requests in flight end, for some seconds, and then ends everything.
Where a server runs from the same folder already, its adapters are looked at and this command ends.
"""

import asyncio
import json
import time
from pathlib import Path

from pydantic import Field
from rich.console import Console

from core.arguments import Arguments, parse
from core.artifacts import EngineStats, ServerStatus
from core.errors import UserError, run
from serving.state import State
from serving.supervisor import ServerOptions, Supervisor

ENGINE_OPTIONS = ("threads", "max_waiting", "max_tokens_in_cache", "dtype")
PATIENCE = 15.0  # seconds for a running server to take a new adapter
LOOPBACK = ("127.0.0.1", "::1", "localhost")
EXPOSED = (
    "warning: other machines reach Triton on ports {ports}, which ask for no password; this release of it has known "
    "vulnerabilities. Let only port {gateway} through your firewall, see SECURITY.md."
)


class Options(Arguments):
    folder: Path = Field(Path("exports/serve"), description="what to serve")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 lets other machines in")
    http_port: int = Field(8000, ge=1, le=65535, description="Triton's HTTP")
    grpc_port: int = Field(8001, ge=1, le=65535, description="Triton's gRPC")
    metrics_port: int = Field(8002, ge=1, le=65535, description="Prometheus metrics")
    gateway_port: int = Field(9000, ge=1, le=65535, description="the OpenAI-compatible gateway")
    threads: int | None = Field(None, ge=1, description="of the engine; by default the machine's cores")
    max_waiting: int | None = Field(None, ge=1, description="requests in the queue before others are told 'busy'")
    max_tokens_in_cache: int | None = Field(None, ge=1, description="tokens of all requests: bounds the memory")
    dtype: str | None = Field(None, description="of the engine's weights: bfloat16, float32 or int8")
    log_text: bool = Field(False, description="prompts and answers too in state/requests.jsonl")


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
        given.log_text,
        tuple(engine),
    )
    state, console = State(options.folder / "state"), Console(highlight=False, soft_wrap=True)
    if not (options.folder / "repository" / "gemma" / "1" / "model.py").exists():
        raise UserError(f"{options.folder} holds nothing that this engine serves; make it: make serve TASK=…")
    if not state.take():
        joined(options.folder, state, console)
    else:
        asyncio.run(serve(options, state, console))


async def serve(options: ServerOptions, state: State, console: Console) -> None:
    adapters = [path.name for path in sorted((options.folder / "adapters").iterdir())]
    base = (options.folder / "base").resolve().name
    title = f"Serving {base} with {', '.join(adapters)}" if adapters else f"Serving {base} alone"
    console.print(title)
    if options.host not in LOOPBACK:
        ports = f"{options.http_port}, {options.grpc_port} and {options.metrics_port}"
        console.print(EXPOSED.format(ports=ports, gateway=options.gateway_port))
    supervisor = Supervisor(options, state, lambda line: console.print(line, markup=False))
    running = asyncio.create_task(supervisor.run())
    began = time.monotonic()
    with console.status("Loading"):
        while not running.done() and not supervisor.is_up:
            await asyncio.sleep(0.1)
    if not running.done():
        console.print(f"Ready after {time.monotonic() - began:.1f} s. Ctrl-C ends it.")
        if memory := engine_of(state).memory:
            console.print(in_words(memory))
        console.print(addresses(state.read(), adapters), markup=False)
    await running
    console.print("Ended.")


def joined(folder: Path, state: State, console: Console) -> None:
    """Wait until the running server has every adapter of `folder`, and say so.

    Raises:
        UserError: it has not, after a while.
    """
    wanted = sorted(path.name for path in (folder / "adapters").iterdir())
    until = time.monotonic() + PATIENCE
    while missing := sorted({*wanted} - {*(found := engine_of(state)).adapters}):
        reason = found.broken.get(missing[0])
        if reason or time.monotonic() > until:
            raise UserError(
                f"the running server (process {state.read().pid}) has not taken {missing[0]}: "
                f"{reason or f'what it said is in {state.folder}'}"
            )
        time.sleep(0.25)
    what, status = ", ".join(wanted) or "the base", state.read()
    console.print(f"A server is running already (process {status.pid}); it serves {what}.", markup=False)
    console.print(addresses(status, wanted), markup=False)


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


def addresses(status: ServerStatus, adapters: list[str]) -> str:
    host = status.host
    parameters = json.dumps({"max_tokens": 60, **({"lora_name": adapters[0]} if adapters else {})})
    asked = json.dumps({"text_input": "Hello! ", "parameters": json.loads(parameters)})
    return (
        f"  gRPC     {host}:{status.grpc_port}\n"
        f"  HTTP     http://{host}:{status.http_port}/v2/models/gemma/generate\n"
        f"  OpenAI   http://{host}:{status.gateway_port}/v1\n"
        f"  metrics  http://{host}:{status.metrics_port}/metrics\n"
        f"Try: curl http://{host}:{status.http_port}/v2/models/gemma/generate -d '{asked}'"
    )


if __name__ == "__main__":
    run(main)
