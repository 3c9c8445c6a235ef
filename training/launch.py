"""One command, many processes: who trains, who waits, and what is said when one of them dies.

`python -m commands.train` prepares, evaluates and reports in one process. Only the training between is done by
`trainer.devices` processes on each of `trainer.num_nodes` machines; this file starts them and watches over them. On
several machines the same command runs on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK set as for torchrun and with
a file system they share; those but the first only lend their processes.

Not torchrun itself: it answers a worker's exit code, and a signal, with a traceback and 1, where a scheduler and a user
need to know which. What the workers find (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...) is the same.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from core.errors import UserError
from training.stopping import LOST, Stopped

if TYPE_CHECKING:
    from torch.distributed import TCPStore

STRATEGIES = ("auto", "ddp", "fsdp2", "tp")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # to the workers, whose answer is passed on
CTRL_C = 130  # the exit code of a program stopped by it
GRACE = 10.0  # seconds the others have to end by themselves when one has died
JOIN = 3600.0  # seconds a machine waits for the first one to appear; what that one does before training has no limit


class Lost(UserError):
    """A process or machine of the run has gone, for a reason that need not be there the next time."""

    exit_code = LOST


def check_processes(config: DictConfig) -> int:
    """How many processes `config.trainer` asks for.

    Raises:
        UserError: a number or name that means nothing, or that does not fit this machine or the PEFT method.
    """
    trainer = config.trainer
    for name in ("devices", "num_nodes"):
        if not isinstance(trainer[name], int) or trainer[name] < 1:
            raise UserError(f"trainer.{name}={trainer[name]} must be a whole number from 1")
    if trainer.strategy not in STRATEGIES:
        raise UserError(f"trainer.strategy={trainer.strategy} is unknown. Known: {', '.join(STRATEGIES)}")
    processes = trainer.devices * trainer.num_nodes
    if trainer.strategy != "auto" and processes == 1:
        raise UserError(f"trainer.strategy={trainer.strategy} is for several processes: set trainer.devices=2 or more")
    if trainer.strategy == "tp" and trainer.devices == 1:
        raise UserError("trainer.strategy=tp splits the model over the devices of a machine: set trainer.devices")
    if trainer.accelerator == "gpu":
        import torch

        if trainer.devices > torch.cuda.device_count():
            raise UserError(f"trainer.devices={trainer.devices}, but this machine has {torch.cuda.device_count()} GPUs")
    if trainer.num_nodes > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"trainer.num_nodes={trainer.num_nodes}: {', '.join(missing)} must be set in the environment of every "
                f"machine: the first one's address, a free port there, and this machine's number from 0"
            )
        if os.environ["NODE_RANK"] not in map(str, range(trainer.num_nodes)):
            raise UserError(f"NODE_RANK={os.environ['NODE_RANK']} must be from 0 to {trainer.num_nodes - 1}")
    return processes


def check_heads(config: DictConfig, base_folder: Path) -> None:
    """Raises a UserError where tensor parallelism cannot split the base in `base_folder` so."""
    if config.trainer.strategy != "tp":
        return
    model = json.loads((base_folder / "config.json").read_text())
    names = ("num_key_value_heads", "num_attention_heads", "intermediate_size")
    sizes = [n for n in range(2, model[names[0]] + 1) if not any(model[name] % n for name in names)]
    if config.trainer.devices not in sizes:
        has = f"{config.model.name} has {model[names[0]]} key/value heads"
        can = f"trainer.devices may be {' or '.join(map(str, sizes))}" if sizes else "it cannot be split"
        raise UserError(f"trainer.strategy=tp: {has}, so {can}. trainer.strategy=ddp and fsdp2 take any number")


def node_rank(config: DictConfig) -> int:
    return int(os.environ["NODE_RANK"]) if config.trainer.num_nodes > 1 else 0


def open_store(config: DictConfig) -> "TCPStore":
    """Where the processes of all machines find each other; the first machine's parent process holds it.

    On one machine it listens on 127.0.0.1 only.
    """
    from torch.distributed import DistNetworkError, DistStoreError, TCPStore

    if config.trainer.num_nodes == 1:
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no other machine, and no look-up of this one's name
        return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    first = node_rank(config) == 0
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until = time.monotonic() + (0 if first else JOIN)
    while True:  # a few seconds at a time, as a signal is not heard in between
        try:
            return TCPStore(
                address, port, is_master=first, wait_for_workers=False, timeout=timedelta(seconds=300 if first else 5)
            )
        except (DistNetworkError, DistStoreError) as error:
            if time.monotonic() > until:
                kind, what = (UserError, "cannot listen") if first else (Lost, "no answer")
                raise kind(f"{what} on MASTER_ADDR={address} MASTER_PORT={port}: {error}") from None


def follow(config: DictConfig) -> None:
    """Another machine than the first: lend it processes when it comes to the training."""
    print(f"Waiting for the first machine, {os.environ['MASTER_ADDR']}", flush=True)
    store = open_store(config)
    try:
        came = store.add(f"machine/{node_rank(config)}", 1)
        if came > 1 and store.check(["folders"]):  # the others may wait long for the one that it was
            reason = f"machine {node_rank(config)} has come back, and all begin again from the last checkpoint with it"
            store.compare_set("lost", "", reason)
            raise Lost(reason)
        while not store.check(["folders"]):
            time.sleep(0.2)
        folders = json.loads(store.get("folders"))
    except RuntimeError:
        raise Lost("the first machine ended before it came to the training: see its output") from None
    if folders:
        watch(config, store, folders)


def dismiss(config: DictConfig, store: "TCPStore | None") -> None:
    """Let the other machines go, where there was nothing to train."""
    if store and config.trainer.num_nodes > 1 and not store.check(["folders"]):
        store.set("folders", "[]")
        time.sleep(2)  # the store ends with this process; let them read it


def launch(config: DictConfig, store: "TCPStore", run_folder: Path, base_folder: Path, data_folder: Path) -> float:
    """Train in `trainer.devices` new processes, and those of the other machines.

    Returns:
        The memory in GiB that the largest of this machine's processes held.

    Raises:
        UserError: what stopped them, once: the sentence of one of them; `Lost`: which one died and how.
        SystemExit: with the workers' own exit code, where that says what a scheduler should do.
    """
    from training.memory import give_back

    give_back()  # a worker needs the memory that the base model was asked in
    folders = [str(folder.resolve()) for folder in (run_folder, base_folder, data_folder)]
    store.set("folders", json.dumps(folders))
    watch(config, store, folders)
    return max(float(store.get(f"memory/{rank}")) for rank in range(config.trainer.devices))


def watch(config: DictConfig, store: "TCPStore", folders: list[str]) -> None:
    """Start this machine's workers and stay until all have ended; when one fails, none is left behind."""
    devices, node = config.trainer.devices, node_rank(config)
    world = devices * config.trainer.num_nodes
    logs = Path(folders[0]) / "logs"
    logs.mkdir(exist_ok=True)
    workers: dict[int, subprocess.Popen[bytes]] = {}
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        for worker in workers.values():
            worker.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    killed: set[int] = set()
    deadline = float("inf")
    try:
        for local in range(devices):
            if received:
                break
            rank = node * devices + local
            environment = {
                "RANK": rank,
                "LOCAL_RANK": local,
                "GROUP_RANK": node,
                "NODE_RANK": node,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": devices,
            }
            with (logs / f"process{rank}.log").open("wb") as log:  # the first one writes to the terminal
                output = log if rank else None
                workers[rank] = subprocess.Popen(
                    [sys.executable, "-m", "training.launch", *folders],
                    env={**os.environ, **{name: str(value) for name, value in environment.items()}},
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # Ctrl-C comes from here, once
                )
        while any(worker.poll() is None for worker in workers.values()):
            if any(worker.returncode for worker in workers.values()) or _stopped(store) is not None:
                deadline = min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                for rank, worker in workers.items():
                    if worker.poll() is None:
                        killed.add(rank)
                        worker.kill()
            time.sleep(0.2)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = {rank: worker.returncode for rank, worker in workers.items() if worker.returncode}
    if not codes and len(workers) == devices:
        return
    if why := _stopped(store):
        raise why
    died = {rank: code for rank, code in codes.items() if rank not in killed}
    answers = [code for code in died.values() if code > 2 and code != CTRL_C]
    if received and not answers:  # before a worker was ready to answer it
        if received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + received[0])
    if answers:
        raise SystemExit(answers[0])
    # A worker whose neighbour dies fails too, a moment later: a kill is told before an error.
    rank, code = min(died.items(), key=lambda item: (item[1] > 0, item[0])) if died else (-1, 0)
    how = f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    reason = f"training process {rank} of {world} {how}. The same command goes on from the last checkpoint"
    if code == -signal.SIGKILL:
        reason += ". Memory may have run out: a smaller trainer.micro_batch_tokens needs less"
    written = [logs / f"process{rank}.log" for rank in died if (logs / f"process{rank}.log").stat().st_size]
    if written:
        reason += f". Its output: {', '.join(map(str, written))}"
    with contextlib.suppress(RuntimeError):  # the first machine may have gone
        store.compare_set("lost", "", reason)
    raise Lost(reason)


def _stopped(store: "TCPStore") -> UserError | None:
    """Why all have to stop, where one has said so."""
    try:
        for key, kind in (("stop", UserError), ("lost", Lost)):
            if store.check([key]):
                return kind(store.get(key).decode())
    except RuntimeError:
        return Lost("the first machine has gone: see its output. The same command goes on from the last checkpoint")
    return None


def work(run_folder: Path, base_folder: Path, data_folder: Path) -> None:
    """A worker: join the others and fit."""
    import torch
    import torch.distributed as dist

    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    try:
        config = OmegaConf.load(run_folder / "config.yaml")
        assert isinstance(config, DictConfig)
        if config.trainer.accelerator == "gpu":
            torch.cuda.set_device(local)
        backend = "nccl" if config.trainer.accelerator == "gpu" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("fit", store), rank=rank, world_size=world)

        from core.machine import quiet_libraries

        quiet_libraries()
        from training.fit import fit_folders
        from training.progress import peak_memory_gib

        fit_folders(config, run_folder, base_folder, data_folder)
        store.set(f"memory/{rank}", str(peak_memory_gib()))
        dist.destroy_process_group()
    except UserError as error:
        store.compare_set("stop", "", str(error))
        _leave(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        _leave(stopped.exit_code)
    except SystemExit as way_out:
        _leave(way_out.code if isinstance(way_out.code, int) else 1)
    except Exception:
        with (run_folder / "logs" / f"process{rank}.log").open("a") as log:
            log.write(traceback.format_exc())
        _leave(1)


def _leave(code: int) -> None:
    """At once: tidying up may wait for a process that has died."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave_with_parent() -> None:
    sys.stdin.read()  # ends when the parent process does, however it does
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        work(*map(Path, sys.argv[1:]))
    except KeyboardInterrupt:
        _leave(CTRL_C)
