"""The real tritonserver of nvidia-pytriton's wheel, run as what it is: a server on an ordinary model repository."""

import contextlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import psutil

MODELS = ("gemma", "adapters")
# Whoever would change models, shared memory, traces or logs from outside must send this header, which nobody can: no
# header's name has a line break.
LOCKED = "model-repository,shared-memory,trace,logging:nobody's\nkey=locked\nfor good"


class NoTriton(Exception):
    """It is not installed for this Python."""


def lay_out_backend(folder: Path) -> None:
    """`folder`/python: Triton's Python backend with, beside it where Triton looks for it, the stub for this Python.

    Raises:
        NoTriton
    """
    stub = _server() / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    if not stub.is_dir():
        raise NoTriton(f"there is no {stub}; nvidia-pytriton brings it: make serve-env")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "python").mkdir(parents=True)
    for file in (*(_server() / "backends" / "python").iterdir(), *stub.iterdir()):
        if file.is_file():  # where everything was compiled, as in an image, __pycache__ lies there too
            shutil.copy2(file, folder / "python")


def command(
    repository: Path, backends: Path, host: str, ports: Mapping[str, int], drain: int, shared_memory: str
) -> list[str]:
    """
    Args:
        ports: of "http", "grpc" and "metrics".
        drain: seconds that requests in flight have after SIGTERM.
        shared_memory: how the names of its regions in /dev/shm begin.
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
    """What Triton finds its libraries by, and the stub this very Python; and what it must not be told."""
    libraries = [sysconfig.get_config_var("LIBDIR"), str(_site() / "nvidia_pytriton.libs")]
    return {
        # On Vertex AI this says PREDICTION. Triton 2.51 then closes HTTP and gRPC and opens a frontend on all addresses
        # that passes requests on to the APIs of LOCKED without asking for their header.
        "AIP_MODE": "",
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": ":".join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
    }


def clean_up() -> None:
    """Remove the empty folders in /tmp that killed Tritons have left, unless one is alive, which needs its own."""
    if any(process.info["name"] == "tritonserver" for process in psutil.process_iter(["name"])):
        return
    for folder in Path("/tmp").glob("python_env_*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                folder.rmdir()


def model_of(command_line: list[str]) -> str:
    """Which model a stub runs: `…/repository/<model>/1/model.py` in its command; "" where it is no stub."""
    found = next((Path(word) for word in command_line if word.endswith("/1/model.py")), None)
    return found.parent.parent.name if found else ""


def _site() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _server() -> Path:
    return _site() / "pytriton" / "tritonserver"
