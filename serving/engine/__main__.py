"""The engine's process.

    python -m serving.engine --base models/gemma-3-270m --adapters exports/serve/adapters --socket engine.sock

Prints {"ready": true, …} on stdout when it accepts requests, and logs JSON lines on stderr. On SIGTERM or Ctrl-C it
drains: it finishes the requests that it has and exits with 0. On a second signal it ends them with an error, and on a
third it exits at once. Only its owner may use the socket.
"""

import argparse
import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("serving.engine")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.engine", description="The embedded engine.")
    parser.add_argument("--base", type=Path, required=True, help="folder of a Gemma in Hugging Face format")
    parser.add_argument("--adapters", type=Path, help="folder of PEFT folders, watched while it runs")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--threads", type=_positive, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--max-tokens-in-cache", type=_positive, default=16_384, help="size of the key/value cache")
    parser.add_argument("--max-waiting", type=_positive, default=256, help="requests beyond are refused as busy")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "int8"), default="bfloat16", help="of the base's weights"
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("a whole number above 0")
    return number


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object: time, level, process, event, and the fields of `extra`."""

    standard_fields = frozenset(vars(logging.makeLogRecord({})))

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": "engine",
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in self.standard_fields}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read when torch is loaded
    # On a busy machine, a thread that spins while it waits keeps the thread it waits for from running: steps took five
    # times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages; see docs/serving.md
    from core.errors import UserError

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        serve(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def serve(options: argparse.Namespace) -> None:
    """Load the model, open the socket, and generate until a signal ends it."""
    from core.artifacts import EngineStats
    from serving.engine.connections import Connections, Inbox
    from serving.protocol import HEARTBEAT_SECONDS

    started = time.monotonic()
    stopping, hurrying = threading.Event(), threading.Event()
    inbox: Inbox = queue.SimpleQueue()

    def on_signal(number: int, _: Any) -> None:
        if hurrying.is_set():
            os._exit(128 + number)
        (hurrying if stopping.is_set() else stopping).set()
        inbox.put(lambda: None)  # wakes the loop

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    scheduler, folder = load(options)
    folder.rescan()
    watch = threading.Thread(target=_watch, args=(folder, stopping), name="adapters", daemon=True)
    watch.start()
    memory = memory_of(scheduler.model, scheduler.max_tokens)
    log.info("memory", extra=memory)
    about = {
        "base": options.base.name,
        "dtype": options.dtype,
        "threads": options.threads,
        "pid": os.getpid(),
        "memory": memory,
    }

    def describe() -> dict[str, Any]:
        uptime = time.monotonic() - started
        return EngineStats(**scheduler.stats(), broken=dict(folder.broken), uptime=uptime, **about).to_dict()

    connections = Connections(options.socket, scheduler, inbox, describe)
    ready = {
        "ready": True,
        "seconds": round(time.monotonic() - started, 2),
        **about,
        "adapters": sorted(folder.adapters),
    }
    with contextlib.suppress(OSError):  # its log may lie on a full disk
        print(json.dumps(ready), flush=True)
    heartbeat_due = 0.0
    while not (stopping.is_set() and not scheduler.busy):
        if stopping.is_set() and not scheduler.closing:
            log.info("draining", extra={"running": len(scheduler.running), "waiting": len(scheduler.waiting)})
            scheduler.closing = True
        _run_calls(inbox, 0.0 if scheduler.busy else max(0.0, heartbeat_due - time.monotonic()))
        if hurrying.is_set():
            scheduler.end()
        if time.monotonic() >= heartbeat_due:
            connections.send_heartbeat(scheduler.stats())
            heartbeat_due = time.monotonic() + HEARTBEAT_SECONDS
        if scheduler.busy:
            scheduler.step()
        connections.flush()
    connections.close()
    log.info("stopped")


def _run_calls(inbox: Any, seconds: float) -> None:
    """Run the calls that have arrived, waiting for the first one at most `seconds`."""
    try:
        call = inbox.get(timeout=seconds) if seconds else inbox.get_nowait()
        while True:
            call()
            call = inbox.get_nowait()
    except queue.Empty:
        pass


def _watch(folder: Any, stopping: threading.Event) -> None:
    while not stopping.wait(1.0):
        folder.rescan()


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The scheduler with its model, and the watched folder of adapters.

    Raises:
        UserError: the base cannot be loaded.
    """
    import torch
    from tokenizers import Tokenizer

    from core.errors import UserError
    from serving.engine.adapters import AdapterFolder
    from serving.engine.kv_cache import BLOCK
    from serving.engine.scheduler import Scheduler

    torch.set_num_threads(options.threads)
    blocks = max(1, options.max_tokens_in_cache // BLOCK)
    model = load_model(options, blocks)
    try:
        tokenizer = Tokenizer.from_file(str(options.base / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{options.base}/tokenizer.json cannot be read: {error}") from None
    folder = AdapterFolder(options.adapters, model.config)
    return Scheduler(
        model, tokenizer, eos_token_ids(options.base, tokenizer), folder.adapters, blocks, options.max_waiting
    ), folder


def memory_of(model: Any, tokens: int) -> dict[str, int]:
    """Bytes of keys and values, once all `tokens` are in use, and of the per-layer table, which stays in its file."""
    table = {} if model.table is None else {"table_in_file": model.table.nbytes}
    return {"keys_and_values": model.config.cache_bytes_per_token * tokens, **table}


def load_model(options: argparse.Namespace, blocks: int) -> Any:
    """The fastest implementation of Gemma on this machine."""
    import torch

    from core.errors import UserError
    from serving.engine.gemma import Gemma
    from serving.engine.kernels import KernelGemma, NoKernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and options.dtype != "float32":
        try:
            return KernelGemma(options.base, blocks, options.threads, int8=options.dtype == "int8")
        except NoKernels as error:
            log.warning("no kernels", extra={"why": str(error)})
    if options.dtype == "int8":
        raise UserError("--dtype int8 needs a CPU and a C compiler; without them, use --dtype bfloat16")
    return Gemma(options.base, getattr(torch, options.dtype), device, blocks)


def eos_token_ids(base: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: those of the model's configuration, and the end of a turn.

    Of a whole model the text part counts too. Gemma 4's chat models name three in generation_config.json, which some
    tools lose.
    """
    found = {tokenizer.token_to_id(name) for name in ("<end_of_turn>", "<turn|>")}
    for name in ("generation_config.json", "config.json"):
        if (base / name).exists():
            settings = json.loads((base / name).read_text())
            for given in (settings, settings.get("text_config") or {}):
                ids = given.get("eos_token_id")
                found |= set(ids) if isinstance(ids, list) else {ids}
    return tuple(sorted(found - {None}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
