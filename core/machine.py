"""The machine and the software that a command runs on."""

import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe_environment() -> dict[str, Any]:
    """Versions and hardware, for the report and for whoever wants the same result again."""
    import platform

    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a container may have no git
        commit = ""
    packages = ["torch", "nemo-toolkit", "lightning", "transformers", "peft", "datasets", "omegaconf"]
    return {
        "command": shlex.join(["python", "-m", "commands.train", *sys.argv[1:]]),
        "commit": commit,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def quiet_libraries() -> None:
    """NeMo, Lightning and its telemetry hook start with remarks that hide what a user needs to read."""
    import logging

    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)
    import lightning.pytorch
    from nemo.utils import logging as nemo_logging

    for name in (lightning.pytorch.__name__, "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    nemo_logging.setLevel(logging.ERROR)
    # NeMo calls several machines without Slurm an error, as it has not tried them; tests/test_distribute.py has.
    logging.getLogger("nemo_logger").addFilter(lambda said: "multi-node training without SLURM" not in str(said.msg))
