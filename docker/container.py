"""Run one of the project's commands in its training image, as if it ran here.

    python3 -m docker.container commands.train task=slang          what `make train TASK=slang RUNTIME=container` calls

The image is built first, mostly from cache; IMAGE=... takes one that is there. `models/ data/ runs/ exports/` and files
that the words name are mounted, so the same command goes on in a container or out of it, and what is written belongs to
the user. Ctrl-C and `docker stop` end in a checkpoint, as outside; the exit code is the command's.
"""

from __future__ import annotations  # the host's Python may be older than the project's

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from docker import UserError, run
from docker.image import ROOT, Engine, build, find_engine, has_gpu, tag, variant

INSIDE = Path("/opt/gemma-nemo")  # the project's folder in the image
HOME = "/tmp"  # and the user's home there
FOLDERS = ("models", "data", "runs", "exports")
READ = ("task.data.source", "model.path", "run")  # words that name something outside of them
WRITTEN = ("data_dir", "runs_dir", "model.models_dir")
# Passed by name: a value in argv would be seen by everybody on the machine.
PASSED = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "HTTPS_PROXY",
    "https_proxy",
    "NO_PROXY",
    "no_proxy",
)
STOP_SECONDS = 300  # what is left to a step and its checkpoint after `docker stop`


def main(words: Sequence[str]) -> None:
    if words == ["--why-not"]:
        print(why_not(), end="")
        return
    if not words:
        raise UserError("name a module and its words, e.g. python3 -m docker.container commands.train task=slang")
    if "engine=automodel" in words:
        raise UserError("ENGINE=automodel is not in the image: use RUNTIME=local")
    engine = find_engine(("docker", "podman"))
    image = os.environ.get("IMAGE") or built(engine)
    command = run_command(engine, image, words)
    print(f"In a container of {image}. Ctrl-C, or {engine.command} stop {container_name()}, ends it", flush=True)
    os.chdir(ROOT)
    os.execvp(command[0], command)  # signals and the exit code have nobody in between


def why_not() -> str:
    """Why a container would not do on this machine, which has a GPU; or ''."""
    try:
        engine = find_engine(("docker", "podman"))
        gpu_flags(engine)
    except UserError as error:
        return str(error)
    return ""


def built(engine: Engine) -> str:
    """The tag of the training image, built or brought up to date."""
    image = tag("train", variant())
    there = subprocess.run([engine.command, "image", "inspect", image], capture_output=True).returncode == 0
    what = "Bringing up to date" if there else "Building, once, some minutes:"
    print(f"{what} {image}", flush=True)
    return build(engine, "train", variant(), quiet=there)


def container_name() -> str:
    return f"gemma-nemo-{os.getpid()}"


def run_command(engine: Engine, image: str, words: Sequence[str]) -> list[str]:
    """The engine's command line that runs `python -m words` in `image`."""
    command = [engine.command, "run", "--rm", "--name", container_name(), "--no-healthcheck"]
    command += ["--stop-timeout", str(STOP_SECONDS)]
    command += ["--interactive", "--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    command += ["--ipc=host"]  # workers share memory; a container's own 64 MiB do not suffice
    if engine.rootless:
        command += ["--user", "0:0"]
    else:
        command += ["--user", f"{os.getuid()}:{os.getgid()}"]
        command += ["--userns=keep-id"] if not engine.is_docker and os.getuid() else []
    command += [] if engine.is_docker else ["--security-opt=label=disable"]  # SELinux would hide the folders
    command += gpu_flags(engine) if has_gpu() and variant() == "gpu" else []
    command += ["--network=host"] if os.environ.get("MASTER_ADDR") else []  # the other machines come to this one
    for name in PASSED:
        command += ["--env", name] if name in os.environ else []
    for folder in FOLDERS:
        (ROOT / folder).mkdir(exist_ok=True)  # docker would make it root's
        command.append(f"--volume={(ROOT / folder).resolve()}:{INSIDE / folder}")
    command += mounts(words)
    return [*command, image, "python", "-m", *words]


def gpu_flags(engine: Engine) -> list[str]:
    """All GPUs, and the limits that NVIDIA asks for.

    Raises:
        UserError: what passes GPUs to containers is not installed.
    """
    if not shutil.which("nvidia-ctk"):
        raise UserError(
            f"{engine.command} cannot pass the GPU on: NVIDIA's Container Toolkit (nvidia-ctk) is not installed"
        )
    if engine.is_docker:
        return ["--gpus=all", "--ulimit=memlock=-1", "--ulimit=stack=67108864"]
    if not [file for folder in ("/etc/cdi", "/var/run/cdi") for file in Path(folder).glob("nvidia*")]:
        raise UserError(
            "podman finds GPUs by their CDI description, and there is none. Write it: "
            "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        )
    limits = ["--ulimit=host"] if os.getuid() else ["--ulimit=memlock=-1", "--ulimit=stack=67108864"]
    return ["--device=nvidia.com/gpu=all", *limits]


def mounts(words: Sequence[str]) -> list[str]:
    """`--volume` for what the words name, at the place inside that they name there.

    Raises:
        UserError: something would be written where it is lost with the container.
    """
    command = []
    for word in words:
        name, _, value = word.lstrip("+").partition("=")
        path = Path(value.strip("'\"")).expanduser()
        if name in READ and (ROOT / path).exists():  # what is not there is answered by the command
            inside = os.path.normpath(INSIDE / value.strip("'\"").replace("~", HOME, 1))
            command.append(f"--volume={(ROOT / path).resolve()}:{inside}:ro")
        elif name in WRITTEN and not path.is_absolute() and path.parts[0] not in FOLDERS:
            raise UserError(f"{word} is not shared with the container: name a folder of {' '.join(FOLDERS)}, or /...")
        elif name in WRITTEN and path.is_absolute():
            path.parent.mkdir(parents=True, exist_ok=True)
            command.append(f"--volume={path.parent}:{path.parent}")  # a folder of data is replaced as a whole
    return list(dict.fromkeys(command))


if __name__ == "__main__":
    run(main)
