"""A real Slurm of two nodes on loopback, each with eight GPUs that are stand-ins (/dev/null by another name).

    python tests/slurm_cluster.py FOLDER        brings one up, says how to talk to it, and takes it down on Ctrl-C

Debian's packages `slurm-wlm` and `munge` and root are all it needs. Everything it writes lies in its folder, every port
is a free one, and what it started is gone when it ends. Partitions: `batch`, the default, whose jobs give way to those
of `urgent`, and `lab`, for an account of that name.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GPUS = 8
NOTHING = 0o20666, os.makedev(1, 3)  # a device like /dev/null
SILENCE = 20  # seconds after which a node that does not answer is down
SLURM_CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SlurmdTimeout={silence}
MessageTimeout=10
KillWait=20
ReturnToService=2
GresTypes=gpu
PropagateResourceLimits=NONE
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=16 RealMemory=8000 Gres=gpu:{gpus}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=16 RealMemory=8000 Gres=gpu:{gpus}
PartitionName=batch Nodes=node[1-2] Default=YES PriorityTier=1 MaxTime=1-0 DefaultTime=60 State=UP
PartitionName=urgent Nodes=node[1-2] PriorityTier=10 State=UP
PartitionName=lab Nodes=node[1-2] AllowAccounts=lab State=UP
"""


def missing() -> str:
    """What this machine lacks for it, or ''."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.mknod(f"{folder}/gpu", *NOTHING)
        except OSError:
            return "this machine makes no devices, which stand in for GPUs"
    programs = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not _program(name)]
    return f"{', '.join(programs)} not installed (apt-get install slurm-wlm munge)" if programs else ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """`environment` is what a program needs to talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, dict[str, subprocess.Popen[bytes]]()
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool-node1", "spool-node2", "gpus"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munged asks for it
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        for number in range(GPUS):
            os.mknod(self.folder / f"gpus/gpu{number}", *NOTHING)
        with contextlib.ExitStack() as free:
            ports = [free.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
        names = dict(zip(("port", "port1", "port2"), ports, strict=True))
        text = SLURM_CONF.format(folder=self.folder, host=socket.gethostname(), silence=SILENCE, gpus=GPUS, **names)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(
            f"NodeName=node[1-2] Name=gpu File={self.folder}/gpus/gpu[0-{GPUS - 1}] Flags=nvidia_gpu_env\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        try:
            self._start(
                "munged",
                "--foreground",
                "--force",
                f"--socket={self.folder}/munge.socket",
                f"--key-file={self.folder}/munge.key",
                f"--pid-file={self.folder}/munged.pid",
                f"--log-file={self.folder}/munged.log",
                f"--seed-file={self.folder}/munged.seed",
            )
            self.wait_for(lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "-D")
            for node in ("node1", "node2"):
                self.start_node(node)
            self.wait_for(lambda: self.ask("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"], 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in ("node1", "node2"):
            self.lose_node(node)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
            daemon.kill()
            daemon.wait()

    def _start(self, name: str, *arguments: str) -> None:
        program = _program(name)
        assert program
        with (self.folder / "daemons.log").open("ab") as log:
            node = arguments[arguments.index("-N") + 1] if "-N" in arguments else name
            self.daemons[node] = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """As if its power were cut: the daemon and all that it had started are killed at once."""
        if not (daemon := self.daemons.pop(node, None)):
            return
        daemon.kill()  # first, so that it starts no more
        daemon.wait()
        mine = {f"SLURM_CONF={self.folder}/slurm.conf".encode(), f"SLURMD_NODENAME={node}".encode()}
        log = self.folder / f"slurmd-{node}.log"  # which every step's own daemon has open
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                task = mine <= set((process / "environ").read_bytes().split(b"\0"))
                if task or any(file.readlink() == log for file in (process / "fd").iterdir()):
                    os.kill(int(process.name), signal.SIGKILL)

    def ask(self, *words: str) -> str:
        """What one of Slurm's own commands answers, its complaints too."""
        done = subprocess.run(words, env=self.environment, text=True, capture_output=True, timeout=30)
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: `{"JobState": "RUNNING", "Restarts": "0", …}`; {} where it does not know it."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", number)))

    def wait_for(self, happened: Callable[[], Any], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > until:
                logs = [file.read_text(errors="replace")[-3000:] for file in sorted(self.folder.glob("*.log"))]
                raise TimeoutError("\n".join([self.ask("squeue"), self.ask("sinfo", "-N"), *logs]))
            time.sleep(0.1)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"error: {reason}")
    with Cluster(Path(sys.argv[1]).resolve()) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit())
        signal.pause()
