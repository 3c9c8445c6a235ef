"""Run one of the project's commands in its training image, as if it ran here.

    python3 docker/container.py commands.train task=slang          what `make train TASK=slang RUNTIME=container` calls

The image is built first, mostly from cache; IMAGE=... uses an existing one. `models/ data/ runs/ exports/` and files
that the arguments name are mounted, so a command can be resumed inside or outside of a container, and its output
belongs to the user. Ctrl-C and `docker stop` end in a checkpoint, as they do outside; the exit code is the command's.
"""

from __future__ import annotations  # the host's Python may be older than the project's

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError, run
from image import ROOT, Engine, build, find_engine, has_gpu, tag, variant

INSIDE = Path("/opt/gemma-nemo")  # the project's folder in the image
HOME = "/tmp"  # the user's home in the image
FOLDERS = ("models", "data", "runs", "exports")
READ = ("task.data.source", "model.path", "run")  # arguments that may name files outside of them
WRITTEN = ("data_dir", "runs_dir", "model.models_dir")
# Passed by name: everybody on the machine could see a value in argv.
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
STOP_SECONDS = 300  # for a step and its checkpoint after `docker stop`


def main(arguments: Sequence[str]) -> None:
    if arguments == ["--why-not"]:
        print(why_not(), end="")
        return
    if not arguments:
        raise UserError("name a module and its arguments, e.g. python3 docker/container.py commands.train task=slang")
    if "engine=automodel" in arguments:
        raise UserError("ENGINE=automodel is not in the image: use RUNTIME=local")
    engine = find_engine(("docker", "podman"))
    image = os.environ.get("IMAGE") or built(engine)
    command = run_command(engine, image, arguments)
    print(
        f"Running in a container of {image}. To stop it: Ctrl-C, or {engine.command} stop {container_name()}",
        flush=True,
    )
    os.chdir(ROOT)
    os.execvp(command[0], command)  # so signals and the exit code pass through directly


def why_not() -> str:
    """Why a container cannot be used on this machine, which has a GPU; '' where it can."""
    try:
        engine = find_engine(("docker", "podman"))
        gpu_flags(engine)
    except UserError as error:
        return str(error)
    return ""


def built(engine: Engine) -> str:
    """Build the training image, or bring it up to date, and return its tag."""
    image = tag("train", variant())
    there = subprocess.run([engine.command, "image", "inspect", image], capture_output=True).returncode == 0
    what = "Bringing up to date" if there else "Building, once, some minutes:"
    print(f"{what} {image}", flush=True)
    return build(engine, "train", variant(), quiet=there)


def container_name() -> str:
    return f"gemma-nemo-{os.getpid()}"


def run_command(engine: Engine, image: str, arguments: Sequence[str]) -> list[str]:
    """The engine's command line that runs `python -m arguments` in `image`."""
    command = [engine.command, "run", "--rm", "--name", container_name(), "--no-healthcheck"]
    command += ["--stop-timeout", str(STOP_SECONDS)]
    command += ["--interactive", "--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    command += ["--ipc=host"]  # workers share memory; a container's default of 64 MiB is too small
    if engine.rootless:
        command += ["--user", "0:0"]
    else:
        command += ["--user", f"{os.getuid()}:{os.getgid()}"]
        command += ["--userns=keep-id"] if not engine.is_docker and os.getuid() else []
    command += [] if engine.is_docker else ["--security-opt=label=disable"]  # SELinux would hide the mounted folders
    command += gpu_flags(engine) if has_gpu() and variant() == "gpu" else []
    command += ["--network=host"] if os.environ.get("MASTER_ADDR") else []  # the other machines connect to this one
    for name in PASSED:
        command += ["--env", name] if name in os.environ else []
    for folder in FOLDERS:
        (ROOT / folder).mkdir(exist_ok=True)  # docker would create it as root
        command.append(f"--volume={(ROOT / folder).resolve()}:{INSIDE / folder}")
    command += mounts(arguments)
    return [*command, image, "python", "-m", *arguments]


def gpu_flags(engine: Engine) -> list[str]:
    """The options for all GPUs, with the limits that NVIDIA recommends.

    Raises:
        UserError: the tools that give containers access to GPUs are not installed.
    """
    if not shutil.which("nvidia-ctk"):
        raise UserError(
            f"{engine.command} cannot use the GPU: NVIDIA's Container Toolkit (nvidia-ctk) is not installed"
        )
    if engine.is_docker:
        return ["--gpus=all", "--ulimit=memlock=-1", "--ulimit=stack=67108864"]
    if not [file for folder in ("/etc/cdi", "/var/run/cdi") for file in Path(folder).glob("nvidia*")]:
        raise UserError(
            "podman needs a CDI specification to find the GPUs, and there is none. Create it: "
            "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        )
    limits = ["--ulimit=host"] if os.getuid() else ["--ulimit=memlock=-1", "--ulimit=stack=67108864"]
    return ["--device=nvidia.com/gpu=all", *limits]


def mounts(arguments: Sequence[str]) -> list[str]:
    """`--volume` options for the files and folders that the arguments name, at the same paths inside.

    Raises:
        UserError: an argument names an output folder that would be lost with the container.
    """
    command = []
    for argument in arguments:
        name, _, value = argument.lstrip("+").partition("=")
        path = Path(value.strip("'\"")).expanduser()
        if name in READ and (ROOT / path).exists():  # the command itself reports a missing file
            inside = os.path.normpath(INSIDE / value.strip("'\"").replace("~", HOME, 1))
            command.append(f"--volume={(ROOT / path).resolve()}:{inside}:ro")
        elif name in WRITTEN and not path.is_absolute() and path.parts[0] not in FOLDERS:
            raise UserError(
                f"{argument} is not shared with the container: use a folder in {' '.join(FOLDERS)}, or an absolute path"
            )
        elif name in WRITTEN and path.is_absolute():
            path.parent.mkdir(parents=True, exist_ok=True)
            command.append(
                f"--volume={path.parent}:{path.parent}"
            )  # the parent, as a data folder is replaced as a whole
    return list(dict.fromkeys(command))


if __name__ == "__main__":
    run(main)
