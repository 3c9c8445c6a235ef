"""Starts the worker processes of a distributed run, supervises them, and reports which one failed and why.

`python -m commands.train` prepares, evaluates and reports in one process. Only the training in between is done by
`trainer.devices` worker processes on each of `trainer.num_nodes` machines. On several machines the same command runs on
each, with MASTER_ADDR, MASTER_PORT and NODE_RANK set as for torchrun and with a shared file system; every machine but
the first only runs workers.

    commands.train ──launch──▶ supervise ──▶ python -m training.launcher  (rank 0, 1, … of the first machine)
    commands.train ──join────▶ supervise ──▶ python -m training.launcher  (the ranks of another machine)

Not torchrun itself: it turns a worker's exit code, and a signal, into a traceback and exit code 1, where a scheduler
and a user need to know which it was. The workers' environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …) is the
same.
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

from core.configuration import read_config
from core.errors import UserError
from core.schema import Config
from training.signals import EXIT_LOST, Stopped

if TYPE_CHECKING:
    from torch.distributed import TCPStore

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # to the workers, whose exit code is passed on
EXIT_SIGINT = 130
GRACE_SECONDS = 10.0  # for the other workers to end by themselves when one has died
JOIN_SECONDS = 3600.0  # that a machine waits for the first one's store; what that one does before training has no limit


class WorkerLost(UserError):
    """A process or machine of the run is gone, for a reason that need not recur."""

    exit_code = EXIT_LOST


def check_processes(config: Config) -> int:
    """The number of processes that `config.trainer` asks for.

    Raises:
        UserError: a number or name that is not valid, or does not fit this machine.
    """
    trainer = config.trainer
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
                f"machine: the first one's address, a free port there, and this machine's number, counted from 0"
            )
        if os.environ["NODE_RANK"] not in map(str, range(trainer.num_nodes)):
            raise UserError(f"NODE_RANK={os.environ['NODE_RANK']} must be from 0 to {trainer.num_nodes - 1}")
    return processes


def check_tensor_parallel(config: Config, base_folder: Path) -> None:
    """
    Raises:
        UserError: `trainer.strategy=tp` cannot divide the heads and features of the base among `trainer.devices`.
    """
    if config.trainer.strategy != "tp":
        return
    from transformers import AutoConfig

    from core.layer_shapes import layer_shapes

    layers = layer_shapes(AutoConfig.from_pretrained(base_folder).get_text_config())
    kinds = {(layer.kv_heads, layer.heads, layer.inner) for layer in layers}
    fewest = min(layer.kv_heads for layer in layers)
    sizes = [n for n in range(2, fewest + 1) if not any(size % n for kind in kinds for size in kind)]
    if config.trainer.devices not in sizes:
        some = " in some layers" if len({layer.kv_heads for layer in layers}) > 1 else ""
        has = f"{config.model.name} has {fewest} key/value heads{some}"
        can = f"trainer.devices may be {' or '.join(map(str, sizes))}" if sizes else "it cannot be split"
        raise UserError(f"trainer.strategy=tp: {has}, so {can}. trainer.strategy=ddp and fsdp2 take any number")


def node_rank(config: Config) -> int:
    return int(os.environ["NODE_RANK"]) if config.trainer.num_nodes > 1 else 0


def open_store(config: Config) -> "TCPStore":
    """The rendezvous store of all processes, held by the parent process of the first machine.

    On one machine it listens on 127.0.0.1 only.

    Raises:
        UserError: the first machine cannot listen on MASTER_ADDR and MASTER_PORT.
        WorkerLost: the first machine has not opened its store within an hour.
    """
    from torch.distributed import DistNetworkError, DistStoreError, TCPStore

    if config.trainer.num_nodes == 1:
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no other machine, no look-up of this one's name
        return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    first = node_rank(config) == 0
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + (0 if first else JOIN_SECONDS)
    while True:  # a few seconds at a time, as signals are not handled in between
        try:
            return TCPStore(
                address, port, is_master=first, wait_for_workers=False, timeout=timedelta(seconds=300 if first else 5)
            )
        except (DistNetworkError, DistStoreError) as error:
            if time.monotonic() > deadline:
                kind, what = (UserError, "cannot listen") if first else (WorkerLost, "no answer")
                raise kind(f"{what} on MASTER_ADDR={address} MASTER_PORT={port}: {error}") from None


def join(config: Config) -> None:
    """On every machine but the first: wait until that one starts training, then run this machine's workers.

    Raises:
        UserError, WorkerLost, SystemExit: as `launch`.
    """
    print(f"Waiting for the first machine, {os.environ['MASTER_ADDR']}", flush=True)
    store = open_store(config)
    try:
        arrivals = store.add(f"machine/{node_rank(config)}", 1)
        if arrivals > 1 and store.check(["folders"]):  # the others still wait for its former process
            reason = f"machine {node_rank(config)} has restarted, and all resume from the last checkpoint with it"
            store.compare_set("lost", "", reason)
            raise WorkerLost(reason)
        while not store.check(["folders"]):
            time.sleep(0.2)
        folders = json.loads(store.get("folders"))
    except RuntimeError:
        raise WorkerLost("the first machine ended before training started: see its output") from None
    if folders:
        supervise(config, store, folders)


def release(config: Config, store: "TCPStore | None") -> None:
    """Let the other machines end where there is nothing to train."""
    if store and config.trainer.num_nodes > 1 and not store.check(["folders"]):
        store.set("folders", "[]")
        time.sleep(2)  # the store ends with this process: let them read it first


def launch(config: Config, store: "TCPStore", run_folder: Path, base_folder: Path, data_folder: Path) -> float:
    """On the first machine: train in `trainer.devices` worker processes, and in those of the other machines.

    Returns:
        Peak memory of the largest of this machine's workers, in GiB.

    Raises:
        UserError: the first error of a worker, once.
        WorkerLost: a worker died; the text says which and how.
        SystemExit: with the workers' own exit code, where that tells a scheduler what to do.
    """
    from training.memory import release_memory

    release_memory()  # the workers need what the evaluation of the base model held
    folders = [str(folder.resolve()) for folder in (run_folder, base_folder, data_folder)]
    store.set("folders", json.dumps(folders))
    supervise(config, store, folders)
    return max(float(store.get(f"memory/{rank}")) for rank in range(config.trainer.devices))


def supervise(config: Config, store: "TCPStore", folders: list[str]) -> None:
    """Start this machine's workers and wait for all; when one fails, the others are ended."""
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
            with (logs / f"process{rank}.log").open("wb") as log:  # rank 0 writes to the terminal
                output = log if rank else None
                workers[rank] = subprocess.Popen(
                    [sys.executable, "-m", "training.launcher", *folders],
                    env={**os.environ, **{name: str(value) for name, value in environment.items()}},
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # so that Ctrl-C reaches it once, from here
                )
        while any(worker.poll() is None for worker in workers.values()):
            if any(worker.returncode for worker in workers.values()) or _stopped(store) is not None:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
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
    if error := _stopped(store):
        raise error
    died = {rank: code for rank, code in codes.items() if rank not in killed}
    own_codes = [code for code in died.values() if code > 2 and code != EXIT_SIGINT]
    if received and not own_codes:  # before a worker could handle it
        if received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + received[0])
    if own_codes:
        raise SystemExit(own_codes[0])
    # A worker whose peer dies fails too, a moment later: report a kill rather than an error.
    rank, code = min(died.items(), key=lambda item: (item[1] > 0, item[0])) if died else (-1, 0)
    how = f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    reason = f"training process {rank} of {world} {how}. Run the same command to resume from the last checkpoint"
    if code == -signal.SIGKILL:
        reason += ". Memory may have run out; a smaller trainer.micro_batch_tokens needs less"
    written = [logs / f"process{rank}.log" for rank in died if (logs / f"process{rank}.log").stat().st_size]
    if written:
        reason += f". Its output: {', '.join(map(str, written))}"
    with contextlib.suppress(RuntimeError):  # the first machine may be gone
        store.compare_set("lost", "", reason)
    raise WorkerLost(reason)


def _stopped(store: "TCPStore") -> UserError | None:
    """The error that one of the processes has recorded and that stops all, or None."""
    try:
        for key, kind in (("stop", UserError), ("lost", WorkerLost)):
            if store.check([key]):
                return kind(store.get(key).decode())
    except RuntimeError:
        return WorkerLost(
            "the first machine is gone: see its output. Run the same command to resume from the last checkpoint"
        )
    return None


def run_worker(run_folder: Path, base_folder: Path, data_folder: Path) -> None:
    """A worker process: join the process group and train."""
    import torch
    import torch.distributed as dist

    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    try:
        config = read_config(run_folder / "config.yaml")
        if config.trainer.accelerator == "gpu":
            torch.cuda.set_device(local)
        backend = "nccl" if config.trainer.accelerator == "gpu" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("fit", store), rank=rank, world_size=world)

        from core.machine import loading, quiet_libraries

        with loading():
            quiet_libraries()
            from training.fit import fit_folders
            from training.progress import peak_memory_gib

        fit_folders(config, run_folder, base_folder, data_folder)
        store.set(f"memory/{rank}", str(peak_memory_gib()))
        dist.destroy_process_group()
    except UserError as error:
        store.compare_set("stop", "", str(error))
        _exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        _exit(stopped.exit_code)
    except SystemExit as ended:
        _exit(ended.code if isinstance(ended.code, int) else 1)
    except Exception:
        with (run_folder / "logs" / f"process{rank}.log").open("a") as log:
            log.write(traceback.format_exc())
        _exit(1)


def _exit(code: int) -> None:
    """Exit without cleanup, which may wait for a process that has died."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_with_parent() -> None:
    sys.stdin.read()  # returns when the parent process ends, however it ends
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        run_worker(*map(Path, sys.argv[1:]))
    except KeyboardInterrupt:
        _exit(EXIT_SIGINT)
