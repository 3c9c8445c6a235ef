"""The real tritonserver from nvidia-pytriton's wheel, run directly on an ordinary model repository."""

import contextlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import psutil

MODELS = ("gemma", "adapters")
# The APIs that change models, shared memory, traces or logs require this header. Nobody can send it, since no header's
# name may contain a line break.
LOCKED = "model-repository,shared-memory,trace,logging:nobody's\nkey=locked\nfor good"


class NoTriton(Exception):
    """Triton is not installed for this version of Python."""


def lay_out_backend(folder: Path) -> None:
    """Copy Triton's Python backend to `folder`/python, together with the stub for this version of Python.

    Raises:
        NoTriton: nvidia-pytriton is not installed, or has no stub for this version.
    """
    stub = _server() / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    if not stub.is_dir():
        raise NoTriton(f"{stub} does not exist; nvidia-pytriton installs it: make serve-env")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "python").mkdir(parents=True)
    for file in (*(_server() / "backends" / "python").iterdir(), *stub.iterdir()):
        if file.is_file():  # __pycache__ may lie there too, as in an image
            shutil.copy2(file, folder / "python")


def command(
    repository: Path, backends: Path, host: str, ports: Mapping[str, int], drain: int, shared_memory: str
) -> list[str]:
    """The command line that starts Triton.

    Args:
        ports: of "http", "grpc" and "metrics".
        drain: seconds that requests in flight have to finish after SIGTERM.
        shared_memory: prefix of the names of its regions in /dev/shm.
    """
    return [
        str(_server() / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--disable-auto-complete-config",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in MODELS),
        f"--exit-timeout-secs={drain}",
        "--log-info=false",
        "--allow-gpu-metrics=false",
        *(f"--{name}-port={port}" for name, port in ports.items()),
        *(f"--{name}-address={host}" for name in ports),
        f"--http-restricted-api={LOCKED}",
        f"--grpc-restricted-protocol={LOCKED}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory}",
    ]


def environment() -> dict[str, str]:
    """The environment variables by which Triton finds its libraries and the stub finds this Python."""
    libraries = [sysconfig.get_config_var("LIBDIR"), str(_site() / "nvidia_pytriton.libs")]
    return {
        # Vertex AI sets this to PREDICTION. Triton 2.51 then closes HTTP and gRPC and opens a frontend on all addresses
        # that forwards requests to the APIs of LOCKED without requiring their header.
        "AIP_MODE": "",
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": ":".join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
    }


def clean_up() -> None:
    """Remove the empty folders that killed Tritons left in /tmp, unless a Triton is running, which needs its own."""
    if any(process.info["name"] == "tritonserver" for process in psutil.process_iter(["name"])):
        return
    for folder in Path("/tmp").glob("python_env_*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                folder.rmdir()


def model_of(command_line: list[str]) -> str:
    """The model that a stub runs, from `…/repository/<model>/1/model.py` in its command; "" if it is not a stub."""
    found = next((Path(word) for word in command_line if word.endswith("/1/model.py")), None)
    return found.parent.parent.name if found else ""


def _site() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _server() -> Path:
    return _site() / "pytriton" / "tritonserver"
