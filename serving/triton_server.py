"""A real tritonserver, run on an ordinary model repository: the one on PATH, or that of nvidia-pytriton's wheel.

NVIDIA's images have theirs on PATH, which is newer than the wheel's. Every argument given here was found in Triton's
command_line_parser.cc of 2.73 as well.
"""

import contextlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import psutil

MODELS = ("gemma", "adapters")
STUB = "triton_python_backend_stub"
# Older connections are closed once they have no request, and clients open new ones: Triton has no limit for idle ones.
GRPC_AGE_MS = 600_000
# The APIs that change models, shared memory, traces or logs require this header. Nobody can send it, since no header's
# name may contain a line break.
LOCKED = "model-repository,shared-memory,trace,logging:nobody's\nkey=locked\nfor good"


class NoTriton(Exception):
    """Triton is not installed for this version of Python."""


def lay_out_backend(folder: Path) -> None:
    """Copy Triton's Python backend to `folder`/python, together with the stub for this version of Python.

    Raises:
        NoTriton: there is no Triton, or it has no stub for this version.
    """
    backend, version = _server() / "backends" / "python", f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = backend / STUB  # where Triton was built for one Python; the wheel has stubs for several
    if not stub.is_file():
        stub = _server() / "python_backend_stubs" / version / STUB
    if not stub.is_file():
        raise NoTriton(f"{stub} does not exist; nvidia-pytriton installs it: make serve-env")
    if f"libpython{version}.so".encode() not in stub.read_bytes():
        raise NoTriton(
            f"{stub} runs another Python than {version}, which .venv-serve has. Remove .venv-serve and make it with "
            "the Python that this Triton was built for: make serve-env PYTHON=python3.12"
        )
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "python").mkdir(parents=True)
    for file in (*backend.iterdir(), stub):
        if file.is_file():  # __pycache__ may lie there too, as in an image
            shutil.copy2(file, folder / "python")


def command(
    repository: Path, backends: Path, listening: Mapping[str, tuple[str, int]], drain: int, shared_memory: str
) -> list[str]:
    """The command line that starts Triton.

    Args:
        listening: address and port of "http", "grpc" and "metrics".
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
        *(f"--{name}-address={host}" for name, (host, _) in listening.items()),
        *(f"--{name}-port={port}" for name, (_, port) in listening.items()),
        f"--grpc-max-connection-age={GRPC_AGE_MS}",
        f"--http-restricted-api={LOCKED}",
        f"--grpc-restricted-protocol={LOCKED}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory}",
    ]


def environment() -> dict[str, str]:
    """The environment variables by which Triton finds its libraries and the stub finds this Python."""
    libraries = [sysconfig.get_config_var("LIBDIR")]
    if _server().is_relative_to(_site()):  # another Triton brings its own
        libraries.append(str(_site() / "nvidia_pytriton.libs"))
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
    on_path = shutil.which("tritonserver")
    return Path(on_path).parent.parent if on_path else _site() / "pytriton" / "tritonserver"
