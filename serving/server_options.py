"""What one server serves, where each of its processes listens, and the commands of the engine and the gateway.

Beyond this machine only the gateway is heard. Triton's own ports stay on the loopback address, since they ask for no
key and the Triton of pip has known vulnerabilities (SECURITY.md); `expose` opens its gRPC or its HTTP all the same.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.state import ENGINE_SOCKET

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")


def checked_origin(text: str) -> str:
    """The origin `text` of a web page as browsers send it: in lower case, without the scheme's own port.

    Raises:
        ValueError: it is none; "*" would let any page that somebody opens use the model.
    """
    origin = re.fullmatch(r"(https?://(?:[\w.-]+|\[[0-9a-f:.]+\]))(:\d{1,5})?", text.lower())
    if not origin:
        raise ValueError(
            f"'{text}' is no origin of a web page; write each as https://app.example.org, with its port if any"
        )
    site, port = origin.groups(default="")
    return site if port == (":443" if site.startswith("https") else ":80") else site + port


@dataclass(frozen=True)
class ServerOptions:
    """What to serve, and where; `commands.serve` has the meanings.

    Attributes:
        host: address that the gateway listens on.
        expose: which of Triton's ports, "grpc" and "http", listen there too.
        origins: of web pages that may call the gateway.
        engine: further arguments of `python -m serving.engine`.
        given: the command's arguments, for others to see.
    """

    folder: Path
    host: str = LOOPBACK
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    gateway_port: int = 9000
    expose: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    log_text: bool = False
    keep_alive: int | None = None
    engine: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def listening(self) -> dict[str, tuple[str, int]]:
        """Address and port of each listener: Triton's "http", "grpc" and "metrics", and the "gateway"."""
        found = {}
        for name in ("http", "grpc", "metrics", "gateway"):
            host = self.host if name == "gateway" or name in self.expose else LOOPBACK
            found[name] = host, int(getattr(self, f"{name}_port"))
        return found

    def from_here(self, name: str) -> str:
        """HOST:PORT by which this machine reaches the listener `name`."""
        host, port = self.listening[name]
        return f"{LOOPBACK if host in EVERYWHERE else host}:{port}"

    def engine_command(self) -> list[str]:
        folders = {name: str((self.folder / name).resolve()) for name in ("base", "adapters")}
        named = {**folders, "socket": ENGINE_SOCKET}
        words = [word for name, value in named.items() for word in (f"--{name}", value)]
        return [sys.executable, "-u", "-m", "serving.engine", *words, *self.engine]

    def gateway_command(self) -> list[str]:
        named = {
            "host": self.host,
            "port": str(self.gateway_port),
            "triton": self.from_here("grpc"),
            "triton-http": f"http://{self.from_here('http')}",
            "triton-metrics": f"http://{self.from_here('metrics')}/metrics",
        }
        words = [word for name, value in named.items() for word in (f"--{name}", value)]
        words += [f"--allow-origin={origin}" for origin in self.origins]
        words += [f"--keep-alive={self.keep_alive}"] if self.keep_alive else []
        return [sys.executable, "-u", "-m", "serving.gateway", *words]
