"""The client for an event loop. `sync_client.py` wraps it for programs without one.

A question is first turned into a prompt (`adapter.py`), then sent (`transport.py`). What lies between is here:
deadlines, and a second attempt where the first got no answer at all.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from .adapter import BASE, Adapter, Answer, Message, PreparedRequest
from .errors import Busy, DeadlineExceeded, InvalidRequest, ServingError, TooLong, Unavailable, UnknownAdapter
from .prompt import AnswerPart, AnswerReader
from .transport import AnswerChunk, connect

DEFAULT_URL = "127.0.0.1:8001"
CATALOGUE_SECONDS = 5.0  # for which an entry of the catalogue is cached
T = TypeVar("T")


class AsyncClient:
    """A client for one event loop and any number of concurrent requests.

        async with AsyncClient("127.0.0.1:8001") as client:
            answer = await client.ask("slang", context="You missed the last bus home.", temperature=0.9)

    Args:
        url: HOST:PORT, or a URL with grpc://, grpcs://, http:// or https://.
        headers: sent with every request, e.g. `{"authorization": "Bearer …"}`.
        ca_file: PEM file of the authority that signed the server's certificate; None: the system's authorities.
        first_token_deadline: seconds until the first token, time in the server's queue included.
        token_deadline: seconds between two tokens. Both are only for a server that does not move: a token to anybody
            who uses this client, or a step of the engine (`is_moving`), and the wait begins anew.
        deadline: seconds for a complete answer, retries included; None: as long as it takes.
        retry_for: seconds during which a request is sent again while the server is busy or unavailable. A request that
            has received part of an answer is never repeated.

    Raises:
        ServingError: from every method; the subclass tells the kind of failure.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        headers: Mapping[str, str] | None = None,
        ca_file: str | Path | None = None,
        first_token_deadline: float = 60,
        token_deadline: float = 10,
        deadline: float | None = None,
        retry_for: float = 15,
    ) -> None:
        self.url = url
        self._transport = connect(url, headers or {}, Path(ca_file) if ca_file else None)
        self._first_token_deadline, self._token_deadline = first_token_deadline, token_deadline
        self._deadline, self._retry_for = deadline, retry_for
        self._heard = -math.inf  # when a token came, to any request (monotonic clock)
        self._known: dict[str, tuple[float, Adapter]] = {}

    async def adapters(self) -> list[Adapter]:
        """The adapters that are served beside the base model."""
        return await self._catalogue("")

    async def is_ready(self) -> bool:
        """Whether the server reports itself ready; False where nothing answers."""
        try:
            async with asyncio.timeout(self._token_deadline):
                return await self._transport.ready()
        except (ServingError, TimeoutError):
            return False

    async def is_moving(self, seconds: float) -> bool:
        """Whether the server computed in the last `seconds`: it sent this client a token, or its engine made a step.

        A server that has nothing to do does not move, nor one that does not answer.
        """
        if time.monotonic() - self._heard < seconds:
            return True
        try:
            async with asyncio.timeout(self._token_deadline):
                engine = json.loads(await self._transport.catalogue("", "engine"))
            is_busy = engine.get("running", 0) + engine.get("waiting", 0) > 0
            return is_busy and float(engine["still"]) < seconds
        except (ServingError, TimeoutError, ValueError, KeyError):
            return False

    def stream(self, text: str | Sequence[int], adapter: str | None = None, **sampling: Any) -> "AsyncStream":
        """Continue `text` as it is, with an adapter or the base model alone.

        Args:
            text: or its tokens, <bos> among them, for a server with the embedded engine.
            sampling: vLLM's sampling parameters: temperature, top_p, top_k, max_tokens, stop, seed, ….
        """
        return AsyncStream(self, partial(self.prepare_text, text, adapter, sampling))

    async def generate(self, text: str | Sequence[int], adapter: str | None = None, **sampling: Any) -> Answer:
        """As `stream`, as a whole."""
        return await self.stream(text, adapter, **sampling)

    def ask(
        self,
        adapter: str,
        question: str | Mapping[str, str] | None = None,
        *,
        base: bool = False,
        **fields_and_sampling: Any,
    ) -> "AsyncStream":
        """Ask a task's adapter, with the prompt it was trained with.

            client.ask("squid_game", "Is it too violent?")
            client.ask("slang", context="You missed the last bus home.", condition="Be brief.", temperature=0.9)

        Args:
            question: fills the prompt's main field; or values of its fields, by name. Fields that are left out take the
                task's defaults.
            base: give the same prompt to the base model alone.
            fields_and_sampling: a keyword that names a field of the prompt (`Adapter.fields`) fills it; all others are
                sampling parameters, which override the task's own.
        """
        return AsyncStream(self, partial(self.prepare_question, adapter, question, base, fields_and_sampling))

    def chat(
        self,
        messages: Sequence[Message],
        adapter: str | None = "chat",
        *,
        base: bool = False,
        forget: bool = False,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        **sampling: Any,
    ) -> "AsyncStream":
        """Answer the last of `messages`.

        Args:
            messages: `{"role": "user" or "assistant", "content": "…"}` in turn, after at most one of role "system". One
                more of role "assistant" with `"prefix": True` is the beginning of the answer, which the model goes on
                with.
            adapter: None asks the base model with Gemma's own turns.
            base: ask the base model with the adapter's prompt.
            forget: leave out the oldest exchanges of a dialogue that exceeds the context window, and count them in
                `Answer.forgotten`; otherwise `TooLong` is raised.
            thinking: let the model think before it answers, into `Answer.thought`. Gemma 4 can.
            tools: functions in OpenAI's form that the model may ask to be called, in `Answer.tool_calls`. Gemma 4 can.
                A call and its answer go back as OpenAI's messages, an assistant's with `tool_calls` and a tool's.
        """
        prepare = partial(self.prepare_dialogue, adapter, messages, base, sampling, forget, thinking, tools)
        return AsyncStream(self, prepare)

    async def close(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # What `Client` shares. Each runs when its request is sent, as it may have to fetch the adapter's prompt first.
    async def prepare_text(
        self, text: str | Sequence[int], adapter: str | None, sampling: Mapping[str, Any]
    ) -> PreparedRequest:
        return PreparedRequest(text, dict(sampling) if adapter is None else {**sampling, "lora_name": adapter})

    async def prepare_question(
        self, name: str, question: str | Mapping[str, str] | None, base: bool, fields_and_sampling: Mapping[str, Any]
    ) -> PreparedRequest:
        adapter = await self.adapter(name)
        fields = {name: value for name, value in fields_and_sampling.items() if name in adapter.fields}
        sampling = {name: value for name, value in fields_and_sampling.items() if name not in adapter.fields}
        if isinstance(question, str) and fields:
            if adapter.field is None:
                raise InvalidRequest(f"'{adapter.name}' takes either a question or the fields of its prompt, not both")
            question = {adapter.field: question}
        text = question if isinstance(question, str) else {**(question or {}), **fields}
        return adapter.request(adapter.write(text), base, sampling)

    async def prepare_dialogue(
        self,
        name: str | None,
        messages: Sequence[Message],
        base: bool,
        sampling: Mapping[str, Any],
        forget: bool,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]],
    ) -> PreparedRequest:
        adapter = await self.adapter(name or BASE.name)
        return adapter.dialogue(messages, base or name is None, sampling, forget, thinking, tools)

    async def adapter(self, name: str) -> Adapter:
        """The catalogue's entry for `name`, an adapter's or `BASE.name`, cached for a few seconds."""
        read, known = self._known.get(name, (-math.inf, None))
        if known is None or time.monotonic() - read > CATALOGUE_SECONDS:
            try:
                known = next((adapter for adapter in await self._catalogue(name) if adapter.name == name), None)
            except UnknownAdapter:
                if name != BASE.name:
                    raise
            if known is None and name == BASE.name:
                known = BASE  # an older server does not say
            if known is None:
                raise UnknownAdapter(f"no adapter '{name}' is served")
            self._known[name] = time.monotonic(), known
        return known

    async def _catalogue(self, name: str) -> list[Adapter]:
        async def ask() -> list[Adapter]:
            async with asyncio.timeout(self._token_deadline):
                text = await self._transport.catalogue(name)
            try:
                return [Adapter.read(entry) for entry in json.loads(text)]
            except (ValueError, KeyError, TypeError) as error:
                raise ServingError(f"{self.url}: the catalogue it sent cannot be read ({error})") from None

        try:
            return await self._retried(ask, lambda: True)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.url}: no catalogue within {self._token_deadline:g} s") from None

    async def run(
        self, prepare: Callable[[], Awaitable[PreparedRequest]], answer: Answer, show: Callable[[AnswerPart], None]
    ) -> None:
        """Send a request, fill `answer` as it arrives, and hand each piece of text and of thought to `show`."""
        try:
            async with asyncio.timeout(self._deadline):
                request = await prepare()
                while True:
                    send = partial(self._receive, request, _sampling_json(request), answer, show)
                    try:
                        await self._retried(send, lambda: not answer.output_tokens)
                        break
                    except TooLong:  # only the server can count the tokens
                        if request.shorter is None:
                            raise
                        request = request.shorter()
                        answer.forgotten += 1
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self.url}: the answer was not complete within {self._deadline:g} s; ask for "
                f"fewer tokens, or allow a longer deadline"
            ) from None
        if request.prompt:
            answer.fields = request.prompt.read_response(answer.text)

    async def _receive(
        self, request: PreparedRequest, sampling: str, answer: Answer, show: Callable[[AnswerPart], None]
    ) -> None:
        has_parts = request.prompt and request.prompt.has_gemma4_turns
        reader = AnswerReader(str(request.text)) if has_parts else None
        tokens = 0  # that no part has carried yet

        def add(parts: Iterable[AnswerPart]) -> None:
            nonlocal tokens
            for part in parts:
                answer.text += part.text
                answer.thought += part.thought
                if part.text or part.thought:
                    show(AnswerPart(part.text, part.thought, tokens))
                    tokens = 0

        wants_logprobs = request.sampling.get("logprobs") is not None
        async with aclosing(self._transport.stream(request.text, sampling, wants_logprobs)) as chunks:
            reason = None
            while True:
                chunk = await self._next(chunks, is_first=not answer.output_tokens)
                if chunk is None:
                    break
                answer.input_tokens, reason = chunk.input_tokens, chunk.finish_reason
                answer.output_tokens += chunk.output_tokens
                answer.logprobs += chunk.logprobs
                tokens += chunk.output_tokens
                add(reader.read(chunk.text) if reader else [AnswerPart(chunk.text, "")])
        if reader:
            add(reader.end())
            answer.tool_calls = reader.calls
        if reason is None:
            raise Unavailable(f"{self.url}: the answer ended early")
        answer.finish_reason = reason

    async def _next(self, chunks: AsyncGenerator[AnswerChunk, None], is_first: bool) -> AnswerChunk | None:
        """The next chunk; None at the end.

        Raises:
            DeadlineExceeded: it has not come, and the server does not move.
        """
        seconds = self._first_token_deadline if is_first else self._token_deadline
        coming = asyncio.ensure_future(anext(chunks, None))
        try:
            while not (await asyncio.wait([coming], timeout=seconds))[0]:
                if not await self.is_moving(self._token_deadline) and not coming.done():
                    raise DeadlineExceeded(
                        f"{self.url}: the {'first' if is_first else 'next'} token did not arrive within {seconds:g} s, "
                        f"and the server does not move: it hangs"
                    )
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.wait([coming])
        chunk = coming.result()
        self._heard = time.monotonic()
        return chunk

    async def _retried(self, send: Callable[[], Coroutine[Any, Any, T]], may_retry: Callable[[], bool]) -> T:
        """`send()`, repeated with growing pauses while the server is busy or unavailable and has answered nothing."""
        end, pause = time.monotonic() + self._retry_for, 0.1
        while True:
            try:
                return await send()
            except (Busy, Unavailable):
                wait = random.uniform(0.5, 1) * pause
                if not may_retry() or time.monotonic() + wait > end:
                    raise
            await asyncio.sleep(wait)
            pause = min(2 * pause, 2.0)


class AsyncStream:
    """An answer that is being generated: iterate over its text piece by piece, or await it as a whole.

    The request is sent at once. Leaving `async with`, or dropping the last reference, cancels it in the engine too.
    """

    _is_left = False  # by `cancel`; a deadline cancels the task too, for a moment, but ends in an error

    def __init__(self, client: AsyncClient, prepare: Callable[[], Awaitable[PreparedRequest]]) -> None:
        self._answer = Answer()
        self._parts: asyncio.Queue[AnswerPart | None] = asyncio.Queue()
        self._task = asyncio.ensure_future(client.run(prepare, self._answer, self._parts.put_nowait))
        parts = self._parts
        self._task.add_done_callback(lambda task: parts.put_nowait(None))

    @property
    def answer(self) -> Answer:
        """What has arrived so far; complete when the iteration is over."""
        return self._answer

    def cancel(self) -> None:
        """Stop generating; the iteration ends without an error, and `answer` keeps what has arrived."""
        if not self._task.done():
            self._is_left = True
            self._task.cancel()

    def __await__(self) -> Generator[Any, Any, Answer]:
        return self._whole().__await__()

    async def _whole(self) -> Answer:
        try:
            await asyncio.wait([self._task])
        finally:
            self.cancel()
        if not self._task.cancelled():
            self._task.result()
        return self._answer

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while (part := await self.part()) is not None:
            if part.text:
                return part.text
        raise StopAsyncIteration

    async def part(self) -> AnswerPart | None:
        """The next piece, of the answer or of the thought before it; None at the end."""
        part = await self._parts.get()
        if part is not None and not self._is_left:
            return part
        self._parts.put_nowait(None)  # for another call after the end
        if not self._is_left:
            self._task.result()
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
        await asyncio.wait([self._task])

    def __del__(self) -> None:
        if not self._task.done():
            self._task.cancel()
        elif not self._task.cancelled():
            self._task.exception()  # or asyncio would log an exception that was never retrieved


def _sampling_json(request: PreparedRequest) -> str:
    """The sampling parameters of a request as JSON.

    Raises:
        InvalidRequest: the request cannot be sent: its prompt is empty or not Unicode, or a parameter is not JSON.
    """
    if not request.text:
        raise InvalidRequest("the prompt is empty")
    if not isinstance(request.text, str) and not all(type(one) is int and 0 <= one < 1 << 31 for one in request.text):
        raise InvalidRequest("the prompt is neither a text nor a list of tokens, which are numbers from 0")
    try:
        if isinstance(request.text, str):
            request.text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the prompt is not Unicode: half a character at {error.start}") from None
    try:
        wanted = request.sampling.get("structured_outputs")
        # NVIDIA's vLLM backend reads it from a text.
        nested = {"structured_outputs": json.dumps(wanted, allow_nan=False)} if isinstance(wanted, dict) else {}
        return json.dumps({**request.sampling, **nested}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"sampling parameters: {error}") from None
