"""Build an image with docker, podman or buildah, whichever is there.

    make image                                  the training image: for GPUs where the machine has one, else for CPUs
    make image KIND=serve VARIANT=cpu           BASE_IMAGE=... puts it on an image of your own
    python3 -m docker.image serve cpu           the same

An image takes the network settings of the machine that builds it, and keeps none of them: a CA file (SSL_CERT_FILE),
pip's and uv's configuration (PIP_CONFIG_FILE, UV_CONFIG_FILE), a folder of wheels (PIP_FIND_LINKS).
"""

from __future__ import annotations  # the host's Python may be older than the project's

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from docker import UserError, run

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("train", "serve")
VARIANTS = ("cpu", "gpu")
CPU_BASE = "docker.io/library/python:3.11-slim-bookworm"  # for gpu, the Dockerfiles name NVIDIA's images
SECRETS = {"ca": "SSL_CERT_FILE", "pip_conf": "PIP_CONFIG_FILE", "uv_toml": "UV_CONFIG_FILE"}


@dataclass(frozen=True)
class Engine:
    command: str  # docker, podman or buildah
    is_docker: bool  # not podman under docker's name
    rootless: bool  # root in the container is the user outside


def find_engine(names: Sequence[str] = ("docker", "podman", "buildah")) -> Engine:
    """The first of `names` that answers; a docker client whose daemon cannot be reached does not.

    Raises:
        UserError: none does; says why for each that is installed.
    """
    reasons = []
    for name in names:
        if not shutil.which(name) or (name == "docker" and "podman" in os.environ.get("DOCKER_HOST", "")):
            continue  # through podman's socket it is podman, with fewer words
        asked = subprocess.run(
            [name, "info"] + ([] if name == "buildah" else ["--format", "{{json .}}"]), capture_output=True, text=True
        )
        answer = json.loads(asked.stdout) if asked.stdout.startswith("{") else {}
        if asked.returncode == 0 and not answer.get("ServerErrors"):
            is_docker = name == "docker" and "host" not in answer
            return Engine(name, is_docker, is_docker and "rootless" in str(answer.get("SecurityOptions")))
        why = (answer.get("ServerErrors") or asked.stderr.strip().splitlines() or ["no answer"])[-1]
        reasons.append(f"{name} is installed, but: {why}")
    known = " or ".join(names[:2])
    raise UserError(
        "; ".join(reasons) or f"no container engine is here. Install {known}, for example: sudo apt-get install podman"
    )


def has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def variant() -> str:
    """VARIANT, or what fits this machine."""
    asked = os.environ.get("VARIANT") or ("gpu" if has_gpu() else "cpu")
    if asked not in VARIANTS:
        raise UserError(f"VARIANT={asked} is unknown. Known: {' '.join(VARIANTS)}")
    return asked


def tag(kind: str, variant: str) -> str:
    return f"gemma-nemo/{kind}:{variant}"


def build_command(engine: Engine, kind: str, variant: str) -> list[str]:
    """The engine's own command line; what is secret is named in it, not told."""
    command = [engine.command, "build", "--file", f"docker/{kind}.Dockerfile", "--tag", tag(kind, variant)]
    if not engine.is_docker:
        command += ["--format", "docker"]  # OCI's knows no health check
        command += ["--layers"] if engine.command == "buildah" else []
    base = os.environ.get("BASE_IMAGE") or (CPU_BASE if variant == "cpu" else "")
    command += ["--build-arg", f"BASE_IMAGE={base}"] if base else []
    for name, variable in SECRETS.items():
        file = os.environ.get(variable, "")
        if file and not Path(file).is_file():
            raise UserError(f"{variable}={file} is not a file: the build would go without it")
        command += ["--secret", f"id={name},src={file}"] if file else []
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    command += [f"--build-context=wheels={wheels}"] if wheels and Path(wheels).is_dir() else []
    try:
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        revision = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        revision = ""
    command += ["--build-arg", f"REVISION={revision}"] if revision else []
    return [*command, "."]


def build(engine: Engine, kind: str, variant: str, quiet: bool = False) -> str:
    """Build an image, mostly from cache where it was built before.

    Returns:
        Its tag.

    Raises:
        UserError: the engine cannot build this, or failed; what it said stands above.
    """
    command = build_command(engine, kind, variant)
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    knows = subprocess.run([engine.command, "build", "--help"], capture_output=True, text=True, env=environment).stdout
    if "--secret" not in knows:
        raise UserError(f"{engine.command} builds without BuildKit here: sudo apt-get install docker-buildx")
    if "--build-context" not in knows:  # docker before 23
        command = [word for word in command if not word.startswith("--build-context")]
    output = subprocess.DEVNULL if quiet else None
    if subprocess.run(command + (["--quiet"] if quiet else []), cwd=ROOT, stdout=output, env=environment).returncode:
        raise UserError(
            f"{engine.command} could not build {tag(kind, variant)}: see above. Where the image it is built on "
            "cannot be had, name one that can, with apt or Python 3.11 or 3.12 in it: BASE_IMAGE=..."
        )
    return tag(kind, variant)


def main(words: Sequence[str]) -> None:
    kind = words[0] if words else "train"
    if kind not in KINDS:
        raise UserError(f"KIND={kind} is unknown. Known: {' '.join(KINDS)}")
    if len(words) > 1:
        os.environ["VARIANT"] = words[1]
    engine, chosen = find_engine(), variant()
    print(f"Building {tag(kind, chosen)} with {engine.command}: minutes at first, then from its cache", flush=True)
    print(build(engine, kind, chosen))


if __name__ == "__main__":
    run(main)
