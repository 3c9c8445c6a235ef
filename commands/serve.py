"""Serve what `commands.prepare_serving` prepared: engine, Triton and OpenAI-compatible gateway under a supervisor.

    python -m commands.serve                                 (what `make serve` calls, in the serving environment)
    python -m commands.serve --grpc-port 9001 --threads 4

It stays in the foreground; Ctrl-C or SIGTERM lets requests in flight end, for some seconds, and then ends everything.
Where a server runs from the same folder already, its adapters are looked at and this command ends.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from serving.state import State
from serving.supervisor import Options, StartError, Supervisor

ENGINE_OPTIONS = ("threads", "max_waiting", "max_tokens_in_cache", "dtype")
PATIENCE = 15.0  # seconds for a running server to take a new adapter
LOOPBACK = ("127.0.0.1", "::1", "localhost")
EXPOSED = (
    "warning: other machines reach Triton on ports {ports}, which ask for no password; this release of it has known "
    "vulnerabilities. Let only port {gateway} through your firewall, see SECURITY.md."
)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("serving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("exports/serve"))
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    ports = {
        "http": (8000, "Triton's HTTP"),
        "grpc": (8001, "Triton's gRPC"),
        "metrics": (8002, "Prometheus metrics"),
        "door": (9000, "OpenAI's interface"),
    }
    for name, (port, about) in ports.items():
        parser.add_argument(f"--{name}-port", type=int, default=port, help=f"{about} (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the engine (default: the machine's cores)")
    parser.add_argument("--max-waiting", type=int, help="requests in the queue before others are told 'busy'")
    parser.add_argument("--max-tokens-in-cache", type=int, help="tokens of all requests at once: bounds the memory")
    parser.add_argument("--dtype", help="of the engine's weights: bfloat16, float32 or int8")
    parser.add_argument("--log-text", action="store_true", help="prompts and answers too in state/requests.jsonl")
    given = parser.parse_args(words)
    engine = [
        f"--{name.replace('_', '-')}={value}" for name in ENGINE_OPTIONS if (value := getattr(given, name)) is not None
    ]
    options = Options(
        given.folder,
        given.host,
        given.http_port,
        given.grpc_port,
        given.metrics_port,
        given.door_port,
        given.log_text,
        tuple(engine),
    )
    state, console = State(options.folder / "state"), Console(highlight=False, soft_wrap=True)
    try:
        if not (options.folder / "repository" / "gemma" / "1" / "model.py").exists():
            raise StartError(f"{options.folder} holds nothing that this engine serves; make it: make serve TASK=…")
        if not state.take():
            joined(options.folder, state, console)
        else:
            asyncio.run(serve(options, state, console))
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


async def serve(options: Options, state: State, console: Console) -> None:
    adapters = [path.name for path in sorted((options.folder / "adapters").iterdir())]
    base = (options.folder / "base").resolve().name
    title = f"Serving {base} with {', '.join(adapters)}" if adapters else f"Serving {base} alone"
    console.print(title)
    if options.host not in LOOPBACK:
        ports = f"{options.http_port}, {options.grpc_port} and {options.metrics_port}"
        console.print(EXPOSED.format(ports=ports, gateway=options.door_port))
    supervisor = Supervisor(options, state, lambda line: console.print(line, markup=False))
    running = asyncio.create_task(supervisor.run())
    began = time.monotonic()
    with console.status("Loading"):
        while not running.done() and not supervisor.is_up:
            await asyncio.sleep(0.1)
    if not running.done():
        console.print(f"Ready after {time.monotonic() - began:.1f} s. Ctrl-C ends it.")
        console.print(addresses(state.read(), adapters), markup=False)
    await running
    console.print("Ended.")


def joined(folder: Path, state: State, console: Console) -> None:
    """Wait until the running server has every adapter of `folder`, and say so.

    Raises:
        StartError: it has not, after a while.
    """
    status = state.read()
    wanted = sorted(path.name for path in (folder / "adapters").iterdir())
    until = time.monotonic() + PATIENCE
    while missing := [name for name in wanted if name not in (found := engine_of(state)).get("adapters", [])]:
        reason = found.get("broken", {}).get(missing[0])
        if reason or time.monotonic() > until:
            raise StartError(
                f"the running server (process {status.get('pid')}) has not taken {missing[0]}: "
                f"{reason or f'what it said is in {state.folder}'}"
            )
        time.sleep(0.25)
    what = ", ".join(wanted) or "the base"
    console.print(f"A server is running already (process {status['pid']}); it serves {what}.", markup=False)
    console.print(addresses(status, wanted), markup=False)


def engine_of(state: State) -> dict[str, Any]:
    """What the running engine says of itself; nothing while it is being started."""
    try:
        return state.ask_engine(5)
    except OSError:
        return {}


def addresses(status: dict[str, Any], adapters: list[str]) -> str:
    host = status["host"]
    parameters = json.dumps({"max_tokens": 60, **({"lora_name": adapters[0]} if adapters else {})})
    asked = json.dumps({"text_input": "Hello! ", "parameters": json.loads(parameters)})
    return (
        f"  gRPC     {host}:{status['grpc_port']}\n"
        f"  HTTP     http://{host}:{status['http_port']}/v2/models/gemma/generate\n"
        f"  OpenAI   http://{host}:{status['door_port']}/v1\n"
        f"  metrics  http://{host}:{status['metrics_port']}/metrics\n"
        f"Try: curl http://{host}:{status['http_port']}/v2/models/gemma/generate -d '{asked}'"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
