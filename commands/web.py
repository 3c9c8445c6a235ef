"""Start the site, and the model behind it if none answers.

    make web                                   http://127.0.0.1:8080, for this machine alone
    python -m commands.web clean=true           explicit terms are refused and masked
    WEB_PASSWORD=... python -m commands.web host=0.0.0.0 name=slang.example.org proxy=127.0.0.1

On the internet it belongs behind a proxy that speaks TLS; `proxy` is that proxy's address, from which the visitor's
own is believed. Where Triton does not answer, `make serve` is started as a child, and ended with the site.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from pathlib import Path

from pydantic import Field

from core.arguments import Arguments, parse
from core.errors import UserError, run
from serving.client import AsyncClient
from serving.processes import end_with_us
from serving.web.app import create_app
from serving.web.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
CONNECTIONS = 500  # at once
DRAIN = 30  # seconds that `make serve` has to end


class Options(Arguments):
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=1, le=65535, description="port to listen on")
    name: list[str] = Field([], description="names visitors call the site by")
    proxy: str | None = Field(None, description="address of the proxy in front, whose X-Forwarded-For is believed")
    triton: str = Field(Settings.triton, description="host:port of its gRPC, or a URL of serving.client")
    runs: Path = Field(Settings.runs, description="folder of all runs")
    data: Path = Field(Settings.data, description="folder of all prepared data")
    storage: Path = Field(Settings.storage, description="folder for what visitors keep")
    clean: bool = Field(False, description="refuse and mask explicit terms")
    alone: bool = Field(False, description="do not start `make serve`")


def main(argv: list[str]) -> None:
    given = parse(Options, argv)
    import uvicorn

    from serving.http_connections import KEEP_ALIVE_SECONDS, LimitedConnection

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    if given.host in ("0.0.0.0", "::") and not given.name:
        raise UserError(
            f"host={given.host} answers every network; say by which name or address visitors call the site: "
            "name=slang.example.org"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # through `finally` below, which ends what was started

    settings = Settings(
        triton=given.triton,
        runs=given.runs,
        data=given.data,
        storage=given.storage,
        hosts=(*Settings.hosts, given.host, *given.name),
        password=os.environ.get("WEB_PASSWORD", ""),
        clean=given.clean,
    )
    try:
        listener = socket.create_server((given.host, given.port))
    except OSError as error:
        raise UserError(
            f"{given.host}:{given.port} cannot be used ({error.strerror}). Choose another: port=8081, or "
            "make web ARGS=port=8081"
        ) from None
    stack = None if given.alone or answers(given.triton) else start_stack()
    if stack:
        threading.Thread(target=report_end, args=[stack], daemon=True).start()
    address = f"http://{given.name[0] if given.name else given.host}:{given.port}"
    print(f"\n  {address}\n", flush=True)
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform == "darwin":
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
    server = uvicorn.Config(
        create_app(settings),
        log_level="warning",
        access_log=False,
        server_header=False,
        http=LimitedConnection,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        proxy_headers=bool(given.proxy),
        forwarded_allow_ips=given.proxy,
        timeout_graceful_shutdown=3,
    )
    try:
        uvicorn.Server(server).run([listener])
    except KeyboardInterrupt:
        pass
    finally:
        if stack:
            end_stack(stack)


def answers(triton: str) -> bool:
    async def ask() -> bool:
        async with AsyncClient(triton, token_deadline=2) as client:
            return await client.is_ready()

    return asyncio.run(ask())


def start_stack() -> subprocess.Popen[bytes]:
    """`make serve`, in a process group of its own: Ctrl-C ends the site first, and the site ends it; or its own end."""
    print("No model answers yet: starting `make serve`. The site is there meanwhile.", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "WEB_PASSWORD"}
    words = ["make", "--no-print-directory", "serve", "ARGS="]
    # make hands the signal on to what it runs.
    return subprocess.Popen(
        words, cwd=ROOT, start_new_session=True, env=environment, preexec_fn=end_with_us(signal.SIGTERM)
    )


def report_end(stack: subprocess.Popen[bytes]) -> None:
    if (code := stack.wait()) > 0:  # below it, the site has ended it
        print(f"`make serve` has ended with code {code}; its own words are above.", file=sys.stderr)


def end_stack(stack: subprocess.Popen[bytes]) -> None:
    if stack.poll() is None:
        os.killpg(stack.pid, signal.SIGTERM)
        ends = time.monotonic() + DRAIN
        while stack.poll() is None and time.monotonic() < ends:
            time.sleep(0.1)
    if stack.poll() is None:
        os.killpg(stack.pid, signal.SIGKILL)


if __name__ == "__main__":
    run(main)
