"""Who waits for a long prompt: first and next tokens of others while the engine reads one, beside their time alone.

    python -m benchmarks.fairness                    (the base model of the default configuration)
    python -m benchmarks.fairness processor=avx2

In one process, without Triton and sockets, so that nothing but the engine's own order counts: a short prompt alone and
behind a long one that is being read, the gaps between a stream's tokens without and beside the reading, and the reading
itself beside transformers' forward pass of the same tokens in float32. Each round measures all in turn; medians count.
Prompts are random tokens, none known to the prefix cache. Writes a file in benchmarks/results/fairness/ and the table
in docs/serving.md.
"""

import random
import statistics
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.figures import refresh, result_file
from core.arguments import Arguments, parse
from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import run
from core.files import write_json
from core.machine import confine_to_avx2, cores, describe_environment, let_waiting_threads_sleep

STREAMS = (1, 8)
ANSWER = 24  # tokens of a stream, at least; the gaps between them are measured


class Options(Arguments):
    rounds: int = Field(5, ge=1, description="whose medians count")
    long: int = Field(2500, ge=100, description="tokens of the long prompt")
    short: int = Field(40, ge=2, description="tokens of the short prompt")
    processor: Literal["avx2"] | None = Field(None, description="measure as on an ordinary one: without AVX-512")


def main(argv: list[str]) -> None:
    options = parse(Options, argv)
    let_waiting_threads_sleep()
    if options.processor:
        confine_to_avx2()
    base = ensure_base_model(load_config().model).resolve()
    engine, reference = Engine(base, options.long), Reference(base)
    found: dict[str, list[float]] = defaultdict(list)
    for turn in range(-1, options.rounds):
        measured = one_round(engine, reference, options)
        print(f"round {turn + 1} of {options.rounds}: {measured}" if turn >= 0 else "warm", flush=True)
        for name, seconds in measured.items():
            found[name] += [seconds] if turn >= 0 else []
    machine = describe_environment().machine
    file = result_file("fairness", machine, base.name)
    result = {
        "command": " ".join(["python -m benchmarks.fairness", *argv]),
        "machine": machine,
        "finished": f"{datetime.now(UTC):%Y-%m-%d}",
        "model": base.name,
        "long": options.long,
        "short": options.short,
        "milliseconds": {name: round(1000 * statistics.median(all_), 1) for name, all_ in found.items()},
    }
    write_json(file, result)
    print(f"written: {file}, {', '.join(refresh())}")


def one_round(engine: "Engine", reference: "Reference", options: Options) -> dict[str, float]:
    """Seconds of each part."""
    found: dict[str, float] = {}
    _, found["first token of the short prompt, alone"] = engine.first_token(engine.submit(options.short))
    long = engine.submit(options.long)
    for _ in range(3):
        engine.scheduler.step()
    _, found["first token of the short prompt, behind the long one"] = engine.first_token(engine.submit(options.short))
    engine.first_token(long)
    for streams in STREAMS:
        found |= {f"next token of {streams}, {name}": gap for name, gap in engine.gaps(streams, options.long).items()}
    tokens, found["the long prompt, alone"] = engine.first_token(engine.submit(options.long))
    found["the long prompt, transformers in float32"] = reference.read(tokens)
    return found


class Engine:
    """The scheduler with the kernels of this machine."""

    def __init__(self, base: Path, long: int) -> None:
        from tokenizers import Tokenizer

        from serving.engine.kernels import KernelGemma
        from serving.engine.kv_cache import BLOCK
        from serving.engine.scheduler import Scheduler

        blocks = (2 + max(STREAMS)) * (long + 64) // BLOCK
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self.scheduler = Scheduler(KernelGemma(base, blocks, cores()), tokenizer, (), {}, blocks, 64)
        self.dice = random.Random(0)

    def submit(self, prompt_tokens: int, max_tokens: int = 1) -> Any:
        """A request of random tokens."""
        from serving.engine.scheduler import ScheduledRequest
        from serving.protocol import Generate, read_sampling

        sampling, _ = read_sampling({"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True})
        tokens = [self.dice.randrange(1000, 200_000) for _ in range(prompt_tokens)]
        request = ScheduledRequest(Generate(0, "", sampling, None, False), tokens, lambda _: None, time.monotonic())
        self.scheduler.submit(request)
        return request

    def first_token(self, request: Any) -> tuple[list[int], float]:
        """Its prompt, and the seconds from its arrival to its first token."""
        while request.first_token is None:
            self.scheduler.step()
        return request.tokens[: request.prompt_tokens], request.first_token - request.arrived

    def gaps(self, streams: int, long: int) -> dict[str, float]:
        """Median seconds between a stream's tokens without a prompt, and while a long one is read."""
        running = [self.submit(8, ANSWER + long) for _ in range(streams)]
        for one in running:
            self.first_token(one)
        without = [self._step() for _ in range(ANSWER)]
        prompt = self.submit(long)
        beside = []
        while prompt.first_token is None:
            beside.append(self._step())
        self.scheduler.cancel(lambda _: True)
        return {"alone": statistics.median(without), "beside the long one": statistics.median(beside)}

    def _step(self) -> float:
        began = time.perf_counter()
        self.scheduler.step()
        return time.perf_counter() - began


class Reference:
    """transformers, in float32."""

    def __init__(self, base: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def read(self, tokens: list[int]) -> float:
        """Seconds that a forward pass takes, with the logits of the last token alone."""
        import torch

        with torch.inference_mode():
            began = time.perf_counter()
            self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
            return time.perf_counter() - began


if __name__ == "__main__":
    run(main)
