"""Continuous batching: which tokens of which requests make the next step.

Every step takes one token of each request that is answering and as much of waiting prompts as fits the time a step may
take, so that a long prompt does not stall the streams. A request is taken when blocks for its longest possible answer
are left, so that none that has begun ever lacks memory; others wait, and beyond `max_waiting` are answered "busy".
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.engine.adapters import Adapter
from serving.engine.answer_text import AnswerText
from serving.engine.architecture import BEST, LOGITS, NOTHING, Model, Rows
from serving.engine.kv_cache import BLOCK, BlockPool, digest
from serving.engine.sampling import Sampler
from serving.protocol import (
    BUSY,
    CANCELLED,
    INTERNAL,
    LENGTH,
    STOP,
    UNAVAILABLE,
    UNKNOWN_ADAPTER,
    Done,
    Failed,
    Generate,
    Part,
)

log = logging.getLogger(__name__)
MAX_RUNNING = 64  # rows of a step that answer
STEP_SECONDS = 0.12  # that a step with prompts in it should take
MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 16, 512  # of prompts in a step, whatever they take
Send = Callable[[Part | Done | Failed], None]


@dataclass(eq=False)
class Request:
    """A request on its way.

    Attributes:
        tokens: of the prompt, then of the answer.
        computed: how many of them lie in the cache.
        send: takes the messages about it.
    """

    asked: Generate
    tokens: list[int]
    send: Send
    arrived: float
    connection: object = None  # whose it is
    prompt_tokens: int = 0
    adapter: Adapter | None = None
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    started: float | None = None
    first_token: float | None = None
    sampler: Sampler = None  # type: ignore[assignment]  # given when it is taken
    text: AnswerText = None  # type: ignore[assignment]
    cached: int = 0

    @property
    def most_blocks(self) -> int:
        # The last token of an answer is never computed.
        return -(-(self.prompt_tokens + self.asked.sampling.max_tokens - 1) // BLOCK)

    def named(self, index: int) -> bytes:
        """The name of its block `index`, all of whose tokens are known."""
        while len(self.names) <= index:
            at = len(self.names) * BLOCK
            before = self.names[-1] if self.names else b"%d:" % (self.adapter.version if self.adapter else 0)
            self.names.append(digest(before, self.tokens[at : at + BLOCK]))
        return self.names[index]


class Scheduler:
    """Requests in, messages out, a step at a time. Not for more than one thread."""

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        ends: tuple[int, ...],
        adapters: Mapping[str, Adapter],
        blocks: int,
        max_waiting: int,
    ) -> None:
        """
        Args:
            tokenizer: of the `tokenizers` library.
            ends: tokens that end an answer.
            adapters: those there are now; looked into when a request is taken.
            blocks: of the model's cache.
        """
        self.model, self.tokenizer, self.ends = model, tokenizer, ends
        self.adapters, self.max_waiting = adapters, max_waiting
        self.pool = BlockPool(blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.prompt_budget = 64
        self.closing = False
        self.tokens: Counter[str] = Counter()  # generated, by adapter
        self.counts: Counter[str] = Counter()  # requests by how they ended, prompt and cached tokens, steps

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its answer together."""
        return min(self.model.config.longest, len(self.pool.holders) * BLOCK)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def submit(self, request: Request) -> None:
        """Queue a request, or answer it at once with what is wrong with it."""
        request.prompt_tokens = len(request.tokens)
        name, most = request.asked.lora_name, request.asked.sampling.max_tokens
        if self.closing:
            self._fail(request, UNAVAILABLE, "the engine is shutting down")
        elif name is not None and name not in self.adapters:
            self._fail_unknown(request)
        elif request.prompt_tokens + most > self.longest:
            self._fail(
                request,
                "invalid",
                f"the prompt has {request.prompt_tokens} tokens and max_tokens is {most}; "
                f"together they may be {self.longest} here",
            )
        elif len(self.waiting) >= self.max_waiting:
            self._fail(request, BUSY, f"{len(self.waiting)} requests are waiting already; try again in a moment")
        else:
            self.waiting.append(request)

    def cancel(self, wanted: Callable[[Request], bool]) -> int:
        """End the requests for which `wanted` is true, and count them."""
        found = [one for one in (*self.running, *self.waiting) if wanted(one)]
        for request in found:
            self._finish(request, CANCELLED)
        return len(found)

    def step(self) -> None:
        """One step of everybody. A step that fails is answered to those in it; the others go on."""
        batch: list[tuple[Request, int]] = []
        fresh: list[int] = []  # blocks that this step fills and that others may find already
        try:
            self._compose(batch, fresh)
            if batch:
                started = time.perf_counter()
                self._run(batch)
                self._learn_speed(batch, time.perf_counter() - started)
        except Exception as error:
            log.exception("a step failed", extra={"requests": len(batch)})
            self.pool.forget(fresh)
            for request, _ in batch:
                if request in self.running:
                    self._fail(request, INTERNAL, _sentence(error))
            if not batch and self.waiting:  # nothing to blame but the one that was about to be taken
                self._fail(self.waiting[0], INTERNAL, _sentence(error))

    def stats(self) -> dict[str, Any]:
        """What a beat tells."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "kv_tokens": self.pool.held * BLOCK,
            "kv_capacity": len(self.pool.holders) * BLOCK,
            "adapters": sorted(self.adapters),
            "tokens": dict(self.tokens),
            "counts": dict(self.counts),
        }

    def _compose(self, batch: list[tuple[Request, int]], fresh: list[int]) -> None:
        """Fill `batch` with (request, how many of its tokens)."""
        budget = self.prompt_budget
        for request in self.running:
            missing = len(request.tokens) - request.computed
            count = missing if missing == 1 else min(missing, budget)
            if count:
                self._place(request, count, batch, fresh)
                budget -= count if missing > 1 else 0
        while self.waiting and budget > 0 and len(self.running) < MAX_RUNNING:
            request = self.waiting[0]
            name = request.asked.lora_name
            request.adapter = self.adapters.get(name) if name is not None else None
            if name is not None and request.adapter is None:
                self._fail_unknown(request)  # removed while it waited
                continue
            if not self._admit(request):
                break
            missing = len(request.tokens) - request.computed
            count = min(missing, budget)
            self._place(request, count, batch, fresh)
            budget -= count

    def _admit(self, request: Request) -> bool:
        """Take the first of the queue if there is room. False: there is none."""
        whole = (request.prompt_tokens - 1) // BLOCK  # one token at least is computed: its logits are wanted
        request.names.clear()
        found = self.pool.find(request.named(i) for i in range(whole))
        unheld = sum(not self.pool.holders[block] for block in found)
        promised = sum(one.most_blocks - len(one.blocks) for one in self.running)
        if request.most_blocks - len(found) + unheld > self.pool.available - promised:
            return False
        self.waiting.popleft()
        self.running.append(request)
        self.pool.hold(found)
        request.blocks, request.computed = found, len(found) * BLOCK
        request.cached = request.computed
        sampling = request.asked.sampling
        request.sampler = Sampler(sampling, request.tokens, self.ends)
        request.text = AnswerText(self.tokenizer, sampling.stop, sampling.min_tokens)
        request.started = time.monotonic()
        self.counts["prompt_tokens"] += request.prompt_tokens
        self.counts["cached_tokens"] += request.cached
        return True

    def _place(self, request: Request, count: int, batch: list[tuple[Request, int]], fresh: list[int]) -> None:
        """Add `count` tokens of a request to the step. Full blocks may be shared by those that come after it in this
        very step, as a layer's keys and values are all written before any is read."""
        batch.append((request, count))
        end = request.computed + count
        while len(request.blocks) * BLOCK < end:
            request.blocks.append(self.pool.take())
        for index in range(request.computed // BLOCK, end // BLOCK):
            self.pool.name(request.blocks[index], request.named(index))
            fresh.append(request.blocks[index])

    def _run(self, batch: list[tuple[Request, int]]) -> None:
        tokens: list[int] = []
        rows: list[Rows] = []
        for request, count in batch:
            end = request.computed + count
            wanted = NOTHING if end < len(request.tokens) else LOGITS if request.sampler.needs_logits else BEST
            rows.append(Rows(len(tokens), count, request.computed, request.blocks, wanted, request.adapter))
            tokens += request.tokens[request.computed : end]
        best, logits = self.model.step(tokens, rows)
        now = time.monotonic()
        answering = [(request, one.wanted) for (request, _), one in zip(batch, rows, strict=True) if one.wanted]
        for request, count in batch:
            request.computed += count
        for line, (request, wanted) in enumerate(answering):
            self._answer(request, request.sampler.choose(logits[line]) if wanted == LOGITS else best[line], now)

    def _answer(self, request: Request, token: int, now: float) -> None:
        """A request has its next token."""
        sampling = request.asked.sampling
        if request.first_token is None:
            request.first_token = now
        request.tokens.append(token)
        request.sampler.accept(token)
        self.tokens[request.asked.lora_name or ""] += 1
        made = len(request.tokens) - request.prompt_tokens
        ended = token in self.ends and not sampling.ignore_eos and made >= sampling.min_tokens
        full = made >= sampling.max_tokens
        if request.text.add(token, last=ended or full) or ended:
            self._finish(request, STOP)
        elif full:
            self._finish(request, LENGTH)
        elif request.asked.stream and (text := request.text.part()):
            request.send(Part(request.asked.id, text, made))

    def _finish(self, request: Request, reason: str) -> None:
        now = time.monotonic()
        ttft, queued = ((at or now) - request.arrived for at in (request.first_token, request.started))
        text = request.text.part(last=True) if request.text else ""
        made = len(request.tokens) - request.prompt_tokens
        self._leave(request)
        self.counts[reason] += 1
        request.send(
            Done(request.asked.id, text, reason, request.prompt_tokens, made, round(ttft, 6), round(queued, 6))
        )

    def _fail_unknown(self, request: Request) -> None:
        known = ", ".join(sorted(self.adapters)) or "none"
        self._fail(request, UNKNOWN_ADAPTER, f"there is no adapter '{request.asked.lora_name}'. Known: {known}")

    def _fail(self, request: Request, code: str, sentence: str) -> None:
        self._leave(request)
        self.counts[code] += 1
        request.send(Failed(request.asked.id, sentence, code))

    def _leave(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
            self.pool.release(request.blocks)
            request.blocks = []
        elif request in self.waiting:
            self.waiting.remove(request)

    def _learn_speed(self, batch: list[tuple[Request, int]], seconds: float) -> None:
        """Fit the prompts' share of a step to `STEP_SECONDS`."""
        self.counts["steps"] += 1
        reading = sum(count for _, count in batch if count > 1)
        if reading >= self.prompt_budget // 2:
            wanted = reading * STEP_SECONDS / seconds
            self.prompt_budget = int(min(max((self.prompt_budget + wanted) / 2, MIN_PROMPT_TOKENS), MAX_PROMPT_TOKENS))


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError) or "alloc" in str(error) or "out of memory" in str(error):
        return "the engine ran out of memory in this step; try a shorter prompt, or later"
    return f"the engine failed in this step: {type(error).__name__}"
