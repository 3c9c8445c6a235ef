"""Start Triton, the website, Prometheus and Grafana from docker/compose.yaml, and stop them.

make up [TASKS=slang,chat] [VARIANT=cpu]    serve the newest runs; VARIANT=gpu (or ENGINE=vllm) uses NVIDIA's Triton
make up PROFILES=cpu                        without Prometheus and Grafana
make down
python3 docker/stack.py up slang chat       the same
"""

from __future__ import annotations  # the host's Python may be older than the project's

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from container import FOLDERS, gpu_flags
from errors import UserError, run
from image import ROOT, VARIANTS, Engine, build, find_engine, tag, variant

PATIENCE = 1800.0  # seconds: a base may have to be downloaded first, and vLLM loads it for minutes
PORTS = {"GATEWAY_PORT": 9000, "GRPC_PORT": 8001, "WEB_PORT": 8080, "PROMETHEUS_PORT": 9090, "GRAFANA_PORT": 3000}


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] not in (["up"], ["down"]):
        raise UserError("the first argument must be up, which the tasks to serve may follow, or down")
    engine = find_engine(("docker", "podman"))
    chosen = "gpu" if os.environ.get("ENGINE") == "vllm" else variant()
    profiles = (os.environ.get("PROFILES") or f"{chosen} monitoring").split()
    served = [name for name in profiles if name in VARIANTS]
    if len(served) != 1 or set(profiles) - {*VARIANTS, "monitoring"}:
        raise UserError(f"PROFILES={' '.join(profiles)} must name cpu or gpu, and may name monitoring")
    os.environ["VARIANT"] = chosen = served[0]
    os.environ.setdefault("OWNER", "0:0" if engine.rootless else f"{os.getuid()}:{os.getgid()}")
    compose = find_compose(engine)
    if arguments[0] == "down":
        everything = [f"--profile={name}" for name in (*VARIANTS, "monitoring")]
        raise SystemExit(subprocess.run([*compose, *everything, "down"], cwd=ROOT).returncode)
    if chosen == "gpu":
        gpu_flags(engine)  # raises where something is missing for GPUs
    os.environ["SERVED"] = f"tasks={','.join(arguments[1:])}" if arguments[1:] else "default=slang"
    for folder in FOLDERS:
        (ROOT / folder).mkdir(exist_ok=True)  # docker would create it as root
    for kind in ("train", "serve"):
        print(
            f"Building {tag(kind, chosen)} with {engine.command}: some minutes the first time, then from its cache",
            flush=True,
        )
        build(engine, kind, chosen)
    if not up(compose, served):
        raise UserError("the containers did not start: see above")
    wait(engine, compose, served)
    about = {
        "GATEWAY_PORT": "the gateway: OpenAI's /v1, Triton's /v2",
        "GRPC_PORT": "Triton's gRPC",
        "WEB_PORT": "the website",
    }
    if "monitoring" in profiles:
        if up(compose, ["monitoring"]):
            about |= {"PROMETHEUS_PORT": "Prometheus", "GRAFANA_PORT": "Grafana"}
        else:  # their images come from Docker Hub, which may be unreachable
            print(
                "Prometheus and Grafana did not start: see above. PROMETHEUS_IMAGE and GRAFANA_IMAGE name other images"
            )
    for name, what in about.items():
        print(f"  {'' if name == 'GRPC_PORT' else 'http://'}127.0.0.1:{port(name)}  {what}")
    print("To stop it: make down")


def up(compose: list[str], profiles: list[str]) -> bool:
    command = [*compose, *(f"--profile={name}" for name in profiles), "up", "--detach"]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def port(name: str) -> int:
    return int(os.environ.get(name) or PORTS[name])


def find_compose(engine: Engine) -> list[str]:
    """The command line of a compose that works with `engine`, with the project's file.

    Raises:
        UserError: no compose is installed, or podman's socket is missing.
    """
    for command in (["docker", "compose"], ["docker-compose"], ["podman", "compose"]):
        try:
            answer = subprocess.run([*command, "version"], capture_output=True)
        except FileNotFoundError:
            continue
        if answer.returncode == 0:
            if not engine.is_docker and "DOCKER_HOST" not in os.environ:
                os.environ["DOCKER_HOST"] = podman_socket()
            return [*command, "--file", "docker/compose.yaml"]
    raise UserError("docker compose is missing. Install it: sudo apt-get install docker-compose-v2 (or docker-compose)")


def podman_socket() -> str:
    sockets = [Path(os.environ.get("XDG_RUNTIME_DIR", "/run")) / "podman/podman.sock", Path("/run/podman/podman.sock")]
    for socket in sockets:
        if os.access(socket, os.W_OK):
            return f"unix://{socket}"
    raise UserError(
        "compose needs podman's socket, which does not exist. Start it: systemctl --user start "
        "podman.socket, or podman system service --time=0, and set DOCKER_HOST to it"
    )


def wait(engine: Engine, compose: list[str], profiles: list[str]) -> None:
    """Wait until the gateway's /health has generated a token.

    Raises:
        UserError: a container has ended with an error, an adapter does nothing, or no answer came within `PATIENCE`.
    """
    began, shown = time.monotonic(), ""
    while time.monotonic() - began < PATIENCE:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port('GATEWAY_PORT')}/health", timeout=15):
                print(f"Ready after {time.monotonic() - began:.0f} s")
                return
        except urllib.error.HTTPError as error:
            if wrong := wrong_adapters(error):
                raise UserError(f"{wrong}; what the engine says: {' '.join(compose)} logs") from None
        except (urllib.error.URLError, OSError):
            pass
        asked = subprocess.run(
            [*compose, *(f"--profile={name}" for name in profiles), "ps", "--all", "--format", "json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        rows = [json.loads(line) for line in asked.stdout.splitlines()]
        for row in rows:
            inspect = [engine.command, "inspect", "--format", "{{.RestartCount}}", row["ID"]]
            restarts = subprocess.run(inspect, capture_output=True, text=True).stdout.strip()
            if (row["State"] == "exited" and row["ExitCode"]) or restarts not in ("", "0"):
                raise UserError(f"{row['Service']} ended with an error: {' '.join(compose)} logs {row['Service']}")
        now = ", ".join(sorted(f"{row['Service']} {row['State']}" for row in rows))
        if now != shown:
            print(f"{time.monotonic() - began:4.0f} s  {now}", flush=True)
        shown = now
        time.sleep(1)
    raise UserError(f"no answer after {PATIENCE:.0f} s: {' '.join(compose)} logs")


def wrong_adapters(error: urllib.error.HTTPError) -> str | None:
    """What the gateway found wrong with the adapters, which does not pass; None for any other failure of /health."""
    try:
        body = json.loads(error.read())
        return body["error"] if body["status"] == "wrong adapters" else None
    except (ValueError, TypeError, KeyError):
        return None


if __name__ == "__main__":
    run(main)
