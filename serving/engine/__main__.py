"""The engine's process.

    python -m serving.engine --base models/gemma-3-270m --adapters exports/serve/adapters --socket engine.sock

Prints {"ready": true, …} on stdout when it answers, one JSON line for each thing that happens on stderr, and ends with
0 on SIGTERM or Ctrl-C, after what it has begun is answered; on a second one at once. The socket is for its owner alone.
"""

import argparse
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


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.engine", description="The embedded engine.")
    parser.add_argument("--base", type=Path, required=True, help="folder of a Gemma in Hugging Face format")
    parser.add_argument("--adapters", type=Path, help="folder of PEFT folders, watched while it runs")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--threads", type=_positive, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--max-tokens-in-cache", type=_positive, default=16_384, help="bounds the memory of a cache")
    parser.add_argument("--max-waiting", type=_positive, default=256, help="requests beyond are answered 'busy'")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "int8"), default="bfloat16", help="of the base's weights"
    )
    return parser.parse_args(words)


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError("a whole number above 0")
    return number


class JsonLines(logging.Formatter):
    """A log record as one JSON object: time, level, process, event, and what `extra` tells."""

    usual = frozenset(vars(logging.makeLogRecord({})))

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": "engine",
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in self.usual}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def main(words: list[str]) -> int:
    given = arguments(words)
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # read when torch is loaded
    # A thread that waits by spinning keeps the one it waits for from its core wherever others compute too: steps took
    # five times as long on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages; see docs/serving.md
    from serving.engine import UserError

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        serve(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def serve(given: argparse.Namespace) -> None:
    """Load, open the socket, generate until a signal ends it."""
    from core.artifacts import EngineStats
    from serving.engine.connections import Connections, Inbox
    from serving.protocol import BEAT_SECONDS

    started = time.monotonic()
    stopping = threading.Event()
    inbox: Inbox = queue.SimpleQueue()

    def on_signal(number: int, _: Any) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()
        inbox.put(lambda: None)  # wake the loop

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    scheduler, folder = load(given)
    folder.look()
    watch = threading.Thread(target=_watch, args=(folder, stopping), name="adapters", daemon=True)
    watch.start()
    about = {"base": given.base.name, "dtype": given.dtype, "threads": given.threads, "pid": os.getpid()}

    def describe() -> dict[str, Any]:
        uptime = time.monotonic() - started
        return EngineStats(**scheduler.stats(), broken=dict(folder.broken), uptime=uptime, **about).to_dict()

    connections = Connections(given.socket, scheduler, inbox, describe)
    print(
        json.dumps(
            {
                "ready": True,
                "seconds": round(time.monotonic() - started, 2),
                **about,
                "adapters": sorted(folder.adapters),
            }
        ),
        flush=True,
    )
    beat_due = 0.0
    while not (stopping.is_set() and not scheduler.busy):
        if stopping.is_set() and not scheduler.closing:
            log.info("draining", extra={"running": len(scheduler.running), "waiting": len(scheduler.waiting)})
            scheduler.closing = True
        _heed(inbox, 0.0 if scheduler.busy else max(0.0, beat_due - time.monotonic()))
        if time.monotonic() >= beat_due:
            connections.beat(scheduler.stats())
            beat_due = time.monotonic() + BEAT_SECONDS
        if scheduler.busy:
            scheduler.step()
        connections.flush()
    connections.close()
    log.info("stopped")


def _heed(inbox: Any, seconds: float) -> None:
    """Do what has come in; wait for the first of it at most `seconds`."""
    try:
        call = inbox.get(timeout=seconds) if seconds else inbox.get_nowait()
        while True:
            call()
            call = inbox.get_nowait()
    except queue.Empty:
        pass


def _watch(folder: Any, stopping: threading.Event) -> None:
    while not stopping.wait(1.0):
        folder.look()


def load(given: argparse.Namespace) -> tuple[Any, Any]:
    """The scheduler with its model, and the folder of adapters."""
    import torch
    from tokenizers import Tokenizer

    from serving.engine import UserError
    from serving.engine.adapters import AdapterFolder
    from serving.engine.kv_cache import BLOCK
    from serving.engine.scheduler import Scheduler

    torch.set_num_threads(given.threads)
    blocks = max(1, given.max_tokens_in_cache // BLOCK)
    model = load_model(given, blocks)
    try:
        tokenizer = Tokenizer.from_file(str(given.base / "tokenizer.json"))
    except Exception as error:  # tokenizers raises no class of its own
        raise UserError(f"{given.base}/tokenizer.json cannot be read: {error}") from None
    folder = AdapterFolder(given.adapters, model.config)
    return Scheduler(model, tokenizer, ends(given.base, tokenizer), folder.adapters, blocks, given.max_waiting), folder


def load_model(given: argparse.Namespace, blocks: int) -> Any:
    """The form of Gemma that is quickest here."""
    import torch

    from serving.engine import UserError
    from serving.engine.gemma import Gemma
    from serving.engine.kernels import KernelGemma, NoKernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and given.dtype != "float32":
        try:
            return KernelGemma(given.base, blocks, given.threads, int8=given.dtype == "int8")
        except NoKernels as error:
            log.warning("no kernels", extra={"why": str(error)})
    if given.dtype == "int8":
        raise UserError("--dtype int8 needs a CPU and a C compiler; without, give --dtype bfloat16")
    return Gemma(given.base, getattr(torch, given.dtype), device, blocks)


def ends(base: Path, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: those of the model's configuration, and the end of a turn."""
    found = {tokenizer.token_to_id("<end_of_turn>")}
    for name in ("generation_config.json", "config.json"):
        if (base / name).exists():
            given = json.loads((base / name).read_text()).get("eos_token_id")
            found |= set(given) if isinstance(given, list) else {given}
    return tuple(sorted(found - {None}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
