"""A served folder that is ready in seconds: the tiny base with three random adapters, and the stack that serves it."""

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from conftest import PATIENCE, ROOT, until
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from core.artifacts import ServedAdapter
from core.prompt import Prompt
from serving.repository import put_adapter, write_repository

SERVING_PYTHON = ROOT / ".venv-serve/bin/python"
needs_serving = pytest.mark.skipif(not SERVING_PYTHON.exists(), reason="needs the serving environment: make serve-env")
TURNS = "<start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n{response}<eos>"
PROMPTS = {
    "slang": Prompt(
        "Instruction:\n{instruction}\n\nResponse:\n{response}",
        "{tag}{context}{condition}",
        "Slang: {slang}\nDefinition: {description}",
        {"tag": "Make a term:\n", "context": "At the zoo. ", "condition": "Be brief."},
    ),
    "squid_game": Prompt(TURNS, "{question}", "{answer}", {"question": "Summarize"}),
    "chat": Prompt(TURNS, "{message}", "{answer}", {"message": "Hi!"}),
}
SAMPLING = {"temperature": 0.7, "max_tokens": 24}
GREEDY = {"temperature": 0, "max_tokens": 12}
LONG = {"temperature": 0, "max_tokens": 440, "ignore_eos": True}  # 0.2 s of the tiny base
WINDOW = 16_384  # tokens: the tiny base's own is used up before a busy machine's client has left
ENDLESS = {**LONG, "max_tokens": 15_000}  # ten seconds and more
FILLING = {**LONG, "max_tokens": WINDOW - 8}  # four of them fill the cache, and whoever comes then has to wait
QUEUE = 8  # requests that may wait, so that the tests meet a busy server


@dataclass
class Stack:
    """What `python -m commands.serve` runs: the addresses, and the process of each part."""

    process: subprocess.Popen[str]
    folder: Path
    ports: dict[str, int]

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.ports['http']}"

    @property
    def gateway(self) -> str:
        return f"http://127.0.0.1:{self.ports['gateway']}"

    def managed(self, name: str) -> psutil.Process:
        """The process of the engine, of tritonserver or of the gateway."""
        word = {"engine": "serving.engine", "triton": "tritonserver", "gateway": "serving.gateway"}[name]
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if any(word in argument for argument in child.cmdline()))

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """A part that hangs: it is there and does nothing. The supervisor sleeps too, or it would put an end to it."""
        processes = [psutil.Process(self.process.pid), self.managed(name)]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in reversed(processes):
                process.resume()

    def cancelled(self) -> float:
        """How many requests the engine has ended because their client had left."""
        text = httpx.get(f"http://127.0.0.1:{self.ports['metrics']}/metrics", timeout=PATIENCE).text
        lines = [line for line in text.splitlines() if line.startswith("gemma_requests") and '"cancelled"' in line]
        return sum(float(line.split()[-1]) for line in lines)

    def stats(self) -> dict[str, Any]:
        """What the engine says of itself: `running` and `waiting` requests, and more."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.path.relpath(self.folder / "state/engine.sock"))
            connection.settimeout(PATIENCE)
            for line in connection.makefile(encoding="utf-8"):
                if heartbeat := json.loads(line).get("heartbeat"):
                    return dict(heartbeat)
        raise AssertionError("the engine has ended")


def write_tiny_folder(folder: Path, base: Path, scratch: Path) -> None:
    """What `commands.prepare_serving` makes of finished runs, of adapters that nobody trained."""
    for number, (name, prompt) in enumerate(PROMPTS.items()):
        torch.manual_seed(number)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False),
        )
        model.save_pretrained(scratch / name)
        prompt.save(scratch / name)
        put_adapter(
            folder,
            scratch / name,
            ServedAdapter(
                name=name,
                task=name,
                title=name.title(),
                base=base.name,
                sampling=SAMPLING,
                run="a-run",
                has_turns=bool(prompt.end),
                field="context" if name == "slang" else None,
            ),
        )
    write_repository(folder, base)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def is_open(port: int, address: str = "127.0.0.1") -> bool:
    """Whether somebody listens at `port`."""
    with socket.socket() as connection:
        return not connection.connect_ex((address, port))


@contextmanager
def serve_tiny(
    base: Path, scratch: Path, *options: str, window: int = WINDOW, cache: int = 4 * WINDOW
) -> Iterator[Stack]:
    """The tiny folder under `python -m commands.serve`, with room for four `ENDLESS` answers at once."""
    patient = shutil.copytree(base, scratch / base.name)
    config = json.loads((patient / "config.json").read_text())
    (patient / "config.json").write_text(json.dumps({**config, "max_position_embeddings": window}))
    write_tiny_folder(scratch / "serve", patient, scratch)
    with serve(scratch / "serve", "threads=1", f"max_tokens_in_cache={cache}", *options) as stack:
        yield stack


@contextmanager
def serve(folder: Path, *options: str) -> Iterator[Stack]:
    """`python -m commands.serve` of a folder, ready to be asked."""
    if not SERVING_PYTHON.exists():
        pytest.skip("needs the serving environment: make serve-env")
    ports = dict(zip(("http", "grpc", "metrics", "gateway"), free_ports(4), strict=True))
    words = [f"{name}_port={port}" for name, port in ports.items()]
    process = subprocess.Popen(
        [SERVING_PYTHON, "-m", "commands.serve", f"folder={folder}", f"max_waiting={QUEUE}", *words, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = ""
        assert process.stdout
        for line in process.stdout:
            said += line
            if line.startswith("Ready"):
                break
        else:
            raise AssertionError(f"the server did not start:\n{said}")
        until(lambda: is_open(ports["gateway"]))
        yield Stack(process, folder, ports)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
