"""Bring up Triton, the website, Prometheus and Grafana from docker/compose.yaml, and take them down.

make up [TASKS=slang,chat] [VARIANT=cpu]    with the newest runs; VARIANT=gpu (or ENGINE=vllm) is NVIDIA's Triton
make up PROFILES=cpu                        without Prometheus and Grafana
make down
python3 -m docker.stack up slang chat       the same; the words go to commands.prepare_serving
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

from docker import UserError, run
from docker.container import FOLDERS, gpu_flags
from docker.image import ROOT, VARIANTS, Engine, build, find_engine, tag, variant

PATIENCE = 1800.0  # seconds: the first time a base may have to be fetched, and vLLM reads it for minutes
PORTS = {"DOOR_PORT": 9000, "HTTP_PORT": 8000, "WEB_PORT": 8080, "PROMETHEUS_PORT": 9090, "GRAFANA_PORT": 3000}


def main(words: Sequence[str]) -> None:
    if words[:1] not in (["up"], ["down"]):
        raise UserError("say up, with the tasks to serve, or down")
    engine = find_engine(("docker", "podman"))
    chosen = "gpu" if os.environ.get("ENGINE") == "vllm" else variant()
    profiles = (os.environ.get("PROFILES") or f"{chosen} monitoring").split()
    served = [name for name in profiles if name in VARIANTS]
    if len(served) != 1 or set(profiles) - {*VARIANTS, "monitoring"}:
        raise UserError(f"PROFILES={' '.join(profiles)} must be cpu or gpu, and monitoring or not")
    os.environ["VARIANT"] = chosen = served[0]
    os.environ.setdefault("OWNER", "0:0" if engine.rootless else f"{os.getuid()}:{os.getgid()}")
    compose = find_compose(engine)
    if words[0] == "down":
        everything = [f"--profile={name}" for name in (*VARIANTS, "monitoring")]
        raise SystemExit(subprocess.run([*compose, *everything, "down"], cwd=ROOT).returncode)
    if chosen == "gpu":
        gpu_flags(engine)  # or what is missing for it
    os.environ["SERVED"] = " ".join(words[1:]) or "--default slang"
    for folder in FOLDERS:
        (ROOT / folder).mkdir(exist_ok=True)  # docker would make it root's
    for kind in ("train", "serve"):
        print(f"Building {tag(kind, chosen)} with {engine.command}: minutes at first, then from its cache", flush=True)
        build(engine, kind, chosen)
    if not up(compose, served):
        raise UserError("it did not come up: see above")
    wait(engine, compose, served)
    about = {"DOOR_PORT": "OpenAI's interface, /v1", "HTTP_PORT": "Triton", "WEB_PORT": "the website"}
    if "monitoring" in profiles:
        if up(compose, ["monitoring"]):
            about |= {"PROMETHEUS_PORT": "Prometheus", "GRAFANA_PORT": "Grafana"}
        else:  # their images come from Docker Hub, which a machine may not reach
            print("Prometheus and Grafana did not come up, see above; PROMETHEUS_IMAGE and GRAFANA_IMAGE name others")
    for name, what in about.items():
        print(f"  http://127.0.0.1:{port(name)}  {what}")
    print("make down ends it.")


def up(compose: list[str], profiles: list[str]) -> bool:
    command = [*compose, *(f"--profile={name}" for name in profiles), "up", "--detach"]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def port(name: str) -> int:
    return int(os.environ.get(name) or PORTS[name])


def find_compose(engine: Engine) -> list[str]:
    """The command of a compose that speaks with `engine`, and the project's file.

    Raises:
        UserError: none is installed, or podman's socket is not there for it.
    """
    for words in (["docker", "compose"], ["docker-compose"], ["podman", "compose"]):
        try:
            answer = subprocess.run([*words, "version"], capture_output=True)
        except FileNotFoundError:
            continue
        if answer.returncode == 0:
            if not engine.is_docker and "DOCKER_HOST" not in os.environ:
                os.environ["DOCKER_HOST"] = podman_socket()
            return [*words, "--file", "docker/compose.yaml"]
    raise UserError("docker compose is missing. Install it: sudo apt-get install docker-compose-v2 (or docker-compose)")


def podman_socket() -> str:
    sockets = [Path(os.environ.get("XDG_RUNTIME_DIR", "/run")) / "podman/podman.sock", Path("/run/podman/podman.sock")]
    for socket in sockets:
        if os.access(socket, os.W_OK):
            return f"unix://{socket}"
    raise UserError(
        "compose speaks to podman over its socket, which is not there. Start it: systemctl --user start "
        "podman.socket, or podman system service --time=0, and name it in DOCKER_HOST"
    )


def wait(engine: Engine, compose: list[str], profiles: list[str]) -> None:
    """Until the door's /health has generated a token.

    Raises:
        UserError: a container has ended with an error, or it takes too long.
    """
    began, shown = time.monotonic(), ""
    while time.monotonic() - began < PATIENCE:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port('DOOR_PORT')}/health", timeout=15):
                print(f"Ready after {time.monotonic() - began:.0f} s")
                return
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


if __name__ == "__main__":
    run(main)
