"""Continuous batching with chunked prefill: which tokens of which requests make the next step.

Every step computes one token of each decoding request and as much of the prompts as fits the time a step may take
(prompt_budget.py), so that a long prompt does not stall the streams. The prompt with the fewest tokens left is read
first; one that arrived earlier gives way to no more tokens than it has left. A request is admitted when blocks for its
longest possible answer are available, so that a running one never lacks memory; others wait, and beyond `max_waiting`
are refused as "busy".
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from serving.engine.adapters import LoraAdapter
from serving.engine.detokenizer import Detokenizer
from serving.engine.grammar import CannotGoOn, Constraint
from serving.engine.kv_cache import BLOCK, BlockPool, block_hash
from serving.engine.logprobs import token_logprobs
from serving.engine.prompt_budget import PromptBudget
from serving.engine.sampling import Sampler, bad_word_tokens
from serving.engine.step import BEST, LOGITS, NOTHING, Chunk, Model
from serving.protocol import (
    BUSY,
    CANCELLED,
    INTERNAL,
    INVALID,
    LENGTH,
    STOP,
    UNAVAILABLE,
    UNKNOWN_ADAPTER,
    Delta,
    Done,
    Failed,
    Generate,
    Logprobs,
)

log = logging.getLogger(__name__)
MAX_RUNNING = 64  # requests in a step
Send = Callable[[Delta | Done | Failed], None]


@dataclass(eq=False)
class ScheduledRequest:
    """A request with its state in the scheduler.

    Attributes:
        generate: the client's message.
        tokens: of the prompt, then of the answer.
        send: called with each message about it.
        arrived, started, first_token: `time.monotonic()` of arrival, admission and first token.
        connection: of the client.
        constraint: what its answer must match.
        computed: how many of its tokens are in the cache.
        blocks: of the cache, in the order of positions.
        cached: tokens that the prefix cache had.
        given_way: tokens of later requests' prompts that were read before its own.
        logprobs: of tokens whose text has not been sent.
    """

    generate: Generate
    tokens: list[int]
    send: Send
    arrived: float
    connection: object = None
    constraint: Constraint | None = None
    prompt_tokens: int = 0
    adapter: LoraAdapter | None = None
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    started: float | None = None
    first_token: float | None = None
    sampler: Sampler = None  # type: ignore[assignment]  # set at admission
    text: Detokenizer = None  # type: ignore[assignment]
    cached: int = 0
    given_way: int = 0
    logprobs: Logprobs = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Tokens that are not in the cache: 1 in a stream."""
        return len(self.tokens) - self.computed

    @property
    def max_blocks(self) -> int:
        # The last token of an answer is never computed.
        return -(-(self.prompt_tokens + self.generate.sampling.max_tokens - 1) // BLOCK)

    def take_logprobs(self) -> Logprobs | None:
        """Those that go with the next text; None: they were not asked for."""
        taken, self.logprobs = self.logprobs, []
        return None if self.generate.sampling.logprobs is None else taken

    def block_hash(self, index: int) -> bytes:
        """The hash of its block `index`, all of whose tokens are known."""
        while len(self.hashes) <= index:
            at = len(self.hashes) * BLOCK
            parent = self.hashes[-1] if self.hashes else b"%d:" % (self.adapter.version if self.adapter else 0)
            self.hashes.append(block_hash(parent, self.tokens[at : at + BLOCK]))
        return self.hashes[index]


class Scheduler:
    """Requests in, messages out, one step at a time. Not thread-safe."""

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        eos_token_ids: tuple[int, ...],
        adapters: Mapping[str, LoraAdapter],
        blocks: int,
        max_waiting: int,
    ) -> None:
        """
        Args:
            tokenizer: of the `tokenizers` library.
            eos_token_ids: tokens that end an answer.
            adapters: name → adapter; read when a request is admitted, so that it may change at any time.
            blocks: of the model's cache.
            max_waiting: requests beyond are refused as "busy".
        """
        self.model, self.tokenizer, self.eos_token_ids = model, tokenizer, eos_token_ids
        self.adapters, self.max_waiting = adapters, max_waiting
        self.pool = BlockPool(blocks)
        self.waiting: deque[ScheduledRequest] = deque()
        self.running: list[ScheduledRequest] = []
        self.prompt_budget = PromptBudget()
        self.closing = False
        self.tokens: Counter[str] = Counter()  # generated, by adapter
        self.counts: Counter[str] = Counter()  # requests by finish reason or error, prompt and cached tokens, steps

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return min(self.model.config.max_position_embeddings, self.max_tokens)

    @property
    def max_tokens(self) -> int:
        """What the cache has room for, of all requests."""
        return len(self.pool.ref_counts) * BLOCK

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def submit(self, request: ScheduledRequest) -> None:
        """Queue a request, or refuse it at once with an error message."""
        request.prompt_tokens = len(request.tokens)
        name, most = request.generate.lora_name, request.generate.sampling.max_tokens
        parameter, token = request.generate.sampling.highest_token
        if self.closing:
            self._fail(request, UNAVAILABLE, "the engine is shutting down")
        elif name is not None and name not in self.adapters:
            self._fail_unknown(request)
        elif request.prompt_tokens + most > self.max_model_len:
            self._fail(
                request,
                INVALID,
                f"the prompt has {request.prompt_tokens} tokens and max_tokens is {most}; "
                f"together they may be at most {self.max_model_len}",
            )
        elif token >= (vocabulary := self.model.config.vocabulary):
            self._fail(
                request, INVALID, f"{parameter} has the token {token}; this model's tokens are below {vocabulary}"
            )
        elif (token := max(request.tokens)) >= vocabulary:
            self._fail(request, INVALID, f"the prompt has the token {token}; this model's are below {vocabulary}")
        elif len(self.waiting) >= self.max_waiting:
            self._fail(request, BUSY, f"{len(self.waiting)} requests are waiting already; try again in a moment")
        else:
            self.waiting.append(request)

    def cancel(self, matches: Callable[[ScheduledRequest], bool]) -> int:
        """End the requests for which `matches` is true, and return their number."""
        found = [one for one in (*self.running, *self.waiting) if matches(one)]
        for request in found:
            self._finish(request, CANCELLED)
        return len(found)

    def end(self) -> None:
        """End every request with an error: there is no time to finish them."""
        for request in (*self.running, *self.waiting):
            self._fail(request, UNAVAILABLE, "the server was stopped before the answer was complete")

    def step(self) -> None:
        """Run one step. If it fails, the requests in it fail; the others continue."""
        batch: list[tuple[ScheduledRequest, int]] = []
        new_blocks: list[int] = []  # filled by this step, and published already
        try:
            self._build_batch(batch, new_blocks)
            if batch:
                started = time.perf_counter()
                self._run(batch)
                streams = sum(count == 1 for _, count in batch)
                of_prompts = sum(count for _, count in batch) - streams
                self.prompt_budget.learn(streams, of_prompts, time.perf_counter() - started)
                self.counts["steps"] += 1
        except Exception as error:
            log.exception("a step failed", extra={"requests": len(batch)})
            self.pool.evict(new_blocks)
            for request, _ in batch:
                if request in self.running:
                    self._fail(request, INTERNAL, _describe(error))
            if not batch and self.waiting:  # it failed on those that were about to be admitted
                self._fail(self.waiting[0], INTERNAL, _describe(error))

    def stats(self) -> dict[str, Any]:
        """The contents of a heartbeat."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "kv_tokens": self.pool.in_use * BLOCK,
            "kv_capacity": self.max_tokens,
            "adapters": sorted(self.adapters),
            "tokens": dict(self.tokens),
            "counts": dict(self.counts),
        }

    def _build_batch(self, batch: list[tuple[ScheduledRequest, int]], new_blocks: list[int]) -> None:
        """Fill `batch` with (request, number of its tokens)."""
        for request in self.running:
            if request.missing == 1:
                self._schedule(request, 1, batch, new_blocks)
        budget = self.prompt_budget.tokens(len(batch))
        unread = [one for one in self.running if one.missing > 1]
        left = [one.missing for one in unread]
        if len(self.running) < MAX_RUNNING:
            for request in islice(self.waiting, MAX_RUNNING):
                unread.append(request)
                left.append(request.missing - len(self._cached(request)) * BLOCK)
        order = sorted(range(len(unread)), key=lambda i: left[i] - unread[i].given_way)
        admits = True
        for request in (unread[i] for i in order):
            if not budget:
                break
            if request.started is None:
                # One for which there is no room keeps others from being admitted, so that there will be.
                admits = admits and len(self.running) < MAX_RUNNING and self._admit(request)
                if request.started is None:
                    continue
            count = min(request.missing, budget)
            self._schedule(request, count, batch, new_blocks)
            budget -= count
            for other in unread:
                if other.arrived < request.arrived:
                    other.given_way += count

    def _cached(self, request: ScheduledRequest) -> list[int]:
        """The blocks that the prefix cache has of a waiting request. Its adapter may be replaced while it waits."""
        adapter = self.adapters.get(request.generate.lora_name or "")
        if adapter is not request.adapter:
            request.adapter = adapter
            request.hashes.clear()
        whole = (request.prompt_tokens - 1) // BLOCK  # at least one token is computed, for its logits
        return self.pool.lookup(request.block_hash(i) for i in range(whole))

    def _admit(self, request: ScheduledRequest) -> bool:
        """Admit a waiting request, or end it if that fails; returns whether there was room for it."""
        found = self._cached(request)
        if request.adapter is None and request.generate.lora_name is not None:
            self._fail_unknown(request)  # removed while it waited
            return True
        unused = sum(not self.pool.ref_counts[block] for block in found)
        reserved = sum(one.max_blocks - len(one.blocks) for one in self.running)
        if request.max_blocks - len(found) + unused > self.pool.available - reserved:
            return False
        sampling = request.generate.sampling
        try:
            bad_words = bad_word_tokens(self.tokenizer, sampling.bad_words)
            request.sampler = Sampler(sampling, request.tokens, self.eos_token_ids, request.constraint, bad_words)
            request.text = Detokenizer(
                self.tokenizer,
                sampling.stop,
                sampling.min_tokens,
                sampling.skip_special_tokens,
                sampling.include_stop_str_in_output,
            )
        except Exception as error:
            log.exception("a request could not be admitted")
            self._fail(request, INTERNAL, _describe(error))
            return True
        self.waiting.remove(request)
        self.running.append(request)
        self.pool.acquire(found)
        request.blocks, request.computed = found, len(found) * BLOCK
        request.cached = request.computed
        request.started = time.monotonic()
        self.counts["prompt_tokens"] += request.prompt_tokens
        self.counts["cached_tokens"] += request.cached
        return True

    def _schedule(
        self, request: ScheduledRequest, count: int, batch: list[tuple[ScheduledRequest, int]], new_blocks: list[int]
    ) -> None:
        """Add `count` tokens of a request to the step.

        The blocks that they fill are published at once: requests later in this very step may share them, since a
        layer's keys and values are all written before any is read.
        """
        batch.append((request, count))
        end = request.computed + count
        while len(request.blocks) * BLOCK < end:
            request.blocks.append(self.pool.allocate())
        for index in range(request.computed // BLOCK, end // BLOCK):
            self.pool.publish(request.blocks[index], request.block_hash(index))
            new_blocks.append(request.blocks[index])

    def _run(self, batch: list[tuple[ScheduledRequest, int]]) -> None:
        tokens: list[int] = []
        chunks: list[Chunk] = []
        for request, count in batch:
            end = request.computed + count
            needs_logits = request.sampler.needs_logits or request.generate.sampling.logprobs is not None
            output = NOTHING if end < len(request.tokens) else LOGITS if needs_logits else BEST
            chunks.append(Chunk(len(tokens), count, request.computed, request.blocks, output, request.adapter))
            tokens += request.tokens[request.computed : end]
        best, logits = self.model.step(tokens, chunks)
        now = time.monotonic()
        with_output = [request for (request, _), one in zip(batch, chunks, strict=True) if one.output]
        for request, count in batch:
            request.computed += count
        for row, request in enumerate(with_output):
            wanted = request.generate.sampling.logprobs
            own = None if wanted is None else logits[row].copy()  # sampling changes them
            try:
                token = request.sampler.choose(best[row], logits[row])
                if own is not None and wanted is not None:
                    request.logprobs.append(token_logprobs(self.tokenizer, own, token, wanted))
                self._append_token(request, token, now)
            except CannotGoOn as error:
                self._fail(request, INVALID, str(error))

    def _append_token(self, request: ScheduledRequest, token: int, now: float) -> None:
        """Append the next token of a request, send its text, and end it where it is complete."""
        sampling = request.generate.sampling
        if request.first_token is None:
            request.first_token = now
        request.tokens.append(token)
        request.sampler.accept(token)
        self.tokens[request.generate.lora_name or ""] += 1
        generated = len(request.tokens) - request.prompt_tokens
        is_end = (token in self.eos_token_ids and not sampling.ignore_eos) or token in sampling.stop_token_ids
        ended = is_end and generated >= sampling.min_tokens
        complete = False
        if request.constraint:  # where it allows no end, such a token was none of those to choose from
            ended, complete = ended or token in self.eos_token_ids, request.constraint.is_complete
        full = generated >= sampling.max_tokens
        if request.text.add(token, last=ended or complete or full, ends=ended) or ended or complete:
            self._finish(request, STOP)
        elif full:
            self._finish(request, LENGTH)
        elif request.generate.stream and (text := request.text.new_text()):
            request.send(Delta(request.generate.id, text, generated, request.take_logprobs()))

    def _finish(self, request: ScheduledRequest, reason: str) -> None:
        now = time.monotonic()
        ttft, queued = ((at or now) - request.arrived for at in (request.first_token, request.started))
        text = request.text.new_text(last=True) if request.text else ""
        generated = len(request.tokens) - request.prompt_tokens
        self._remove(request)
        self.counts[reason] += 1
        request.send(
            Done(
                request.generate.id,
                text,
                reason,
                request.prompt_tokens,
                generated,
                round(ttft, 6),
                round(queued, 6),
                request.take_logprobs(),
            )
        )

    def _fail_unknown(self, request: ScheduledRequest) -> None:
        known = ", ".join(sorted(self.adapters)) or "none"
        self._fail(request, UNKNOWN_ADAPTER, f"there is no adapter '{request.generate.lora_name}'. Known: {known}")

    def _fail(self, request: ScheduledRequest, code: str, sentence: str) -> None:
        self._remove(request)
        self.counts[code] += 1
        request.send(Failed(request.generate.id, sentence, code))

    def _remove(self, request: ScheduledRequest) -> None:
        if request in self.running:
            self.running.remove(request)
            self.pool.release(request.blocks)
            request.blocks = []
        elif request in self.waiting:
            self.waiting.remove(request)


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError) or "alloc" in str(error) or "out of memory" in str(error):
        return "the engine ran out of memory in this step; try a shorter prompt, or later"
    return f"the engine failed in this step: {type(error).__name__}"
