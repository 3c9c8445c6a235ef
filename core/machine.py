"""The machine and the software that a command runs on."""

import gc
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from core.artifacts import Environment
from core.c_build import processor_flags
from core.errors import UserError

# What keeps torch, MKL, oneDNN, OpenBLAS and the kernels of this project to AVX2, as on a processor without AVX-512.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "KERNEL_CFLAGS": "-march=x86-64-v3",
}


def processor_name() -> str:
    """The model name of this machine's processor, e.g. `Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz`."""
    import platform

    found = re.search(r"^model name\s*: (.+)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def processor_vendor() -> str:
    """As Linux names it, e.g. `GenuineIntel` or `AuthenticAMD`; "" where it does not."""
    found = re.search(r"^vendor_id\s*: (.+)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else ""


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def short_machine_name() -> str:
    """The processor without trademark signs, its cores, and what it is confined to, for tables."""
    name = re.sub(r"\((R|TM)\)", "", processor_name())
    return ", ".join([name, f"{os.cpu_count()} cores", *filter(None, [confinement()])])


def cores() -> int:
    """The logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def confine_to_avx2() -> None:
    """Keep this process and those that it starts to AVX2. Each library looks when it computes for the first time.

    Raises:
        UserError: this processor has no AVX2, or torch has already computed with more.
    """
    import torch

    if "avx2" not in processor_flags().split():
        raise UserError(f"{processor_name()} cannot be confined to AVX2: it has none")
    os.environ |= AVX2
    if (found := torch.backends.cpu.get_cpu_capability()) != "AVX2":
        raise UserError(f"torch cannot be confined to AVX2: it has begun to compute with {found}")


def confinement() -> str:
    """To which instructions the environment confines this process: "confined to AVX2", or "" where it is free.

    Variables of AVX2 that are not all as there are named one by one.
    """
    given = {name: os.environ[name] for name in AVX2 if name in os.environ}
    if given == AVX2:
        return "confined to AVX2" if "avx512f" in processor_flags().split() else ""  # else it has no more
    return "with " + " ".join(f"{name}={value}" for name, value in given.items()) if given else ""


def commit() -> str:
    """This project's commit, with `-dirty` where files differ from it; "" where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a container may have no git
        return ""


def describe_environment() -> Environment:
    """Versions and hardware, for the report and for whoever wants the same result again."""
    import platform

    import torch

    packages = ["torch", "nemo-toolkit", "lightning", "transformers", "peft", "datasets", "omegaconf"]
    return Environment(
        command=shlex.join(["python", "-m", "commands.train", *sys.argv[1:]]),
        commit=commit(),
        python=platform.python_version(),
        packages={name: version(name) for name in packages},
        cpu=processor_name(),
        confined=confinement(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    )


def let_waiting_threads_sleep() -> None:
    """For a command of many short products between reading and Python's own work, before it imports torch: threads that
    wait for the next product sleep. They would spin for most of the time: two thirds of the processor seconds of a
    conversion. And torch asks for large pages of memory: one for each 4 KB of a new tensor would take longer than what
    is then done with it. Whoever has set OMP_WAIT_POLICY or THP_MEM_ALLOC_ENABLE is asked first."""
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def loading() -> Iterator[None]:
    """For the import of large libraries: Python's garbage collector does not look again and again through the objects
    that they make and that all stay. It leaves them alone afterwards too."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries() -> None:
    """Silence the start-up messages of NeMo, Lightning and its telemetry hook, which hide what a user needs to read."""
    import logging

    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)
    import lightning.pytorch
    from nemo.utils import logging as nemo_logging

    for name in (lightning.pytorch.__name__, "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    nemo_logging.setLevel(logging.ERROR)
    # NeMo calls several machines without Slurm an error, as it has not tried them; tests/test_distribute.py has.
    logging.getLogger("nemo_logger").addFilter(lambda said: "multi-node training without SLURM" not in str(said.msg))
