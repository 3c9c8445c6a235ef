"""The client of a served model in an event loop; `client.py` is its front, and has the same without one.

What is asked is written first (`adapter.py`), then sent (`transport.py`). Between the two stand the deadlines, and the
second attempt where the first was not answered at all.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from serving.adapter import BASE, Adapter, Answer, Message, Request
from serving.errors import Busy, DeadlineExceeded, InvalidRequest, ServingError, TooLong, Unavailable, UnknownAdapter
from serving.protocol import RequestError, check_prompt
from serving.transport import connect

DEFAULT_URL = "127.0.0.1:8001"
CATALOGUE_SECONDS = 5.0  # how old what is known of an adapter may be
T = TypeVar("T")


class AsyncClient:
    """A client for one event loop, for any number of requests at once.

    Args:
        url: HOST:PORT or grpc://, grpcs://, http://, https://.
        headers: sent with every request, e.g. `{"authorization": "Bearer …"}`.
        ca_file: PEM of the authority that signed the server's certificate; the system's where None.
        first_token_deadline: seconds until the first token, waiting in the server's queue included.
        token_deadline: seconds between two tokens.
        deadline: seconds for a whole answer, trying again included.
        retry_for: seconds in which a request is sent again while the server is busy or away. Only one of which nothing
            was answered yet is.

    Raises:
        ServingError: every method, of the kind that fits.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        headers: Mapping[str, str] | None = None,
        ca_file: str | Path | None = None,
        first_token_deadline: float = 60,
        token_deadline: float = 10,
        deadline: float = 120,
        retry_for: float = 15,
    ) -> None:
        self.url = url
        self._transport = connect(url, headers or {}, Path(ca_file) if ca_file else None)
        self._first_token_deadline, self._token_deadline = first_token_deadline, token_deadline
        self._deadline, self._retry_for = deadline, retry_for
        self._known: dict[str, tuple[float, Adapter]] = {}

    async def adapters(self) -> list[Adapter]:
        """What is served beside the base."""
        return await self._catalogue("")

    async def is_ready(self) -> bool:
        """Whether the server says that it can be asked; False where nothing answers."""
        try:
            async with asyncio.timeout(self._token_deadline):
                return await self._transport.ready()
        except (ServingError, TimeoutError):
            return False

    def stream(self, text: str, adapter: str | None = None, **sampling: Any) -> "AsyncStream":
        """Continue `text` as it is, with an adapter or the base alone.

        Args:
            sampling: vLLM's parameters: temperature, top_p, top_k, max_tokens, stop, seed, ….
        """
        return AsyncStream(self, partial(self.plain, text, adapter, sampling))

    async def generate(self, text: str, adapter: str | None = None, **sampling: Any) -> Answer:
        """As `stream`, in one piece."""
        return await self.stream(text, adapter, **sampling)

    def ask(
        self, adapter: str, asked: str | Mapping[str, str], *, base: bool = False, **sampling: Any
    ) -> "AsyncStream":
        """Ask a task's adapter a question, or for values of its prompt's fields.

        Args:
            base: give the same prompt to the base alone.
            sampling: in place of the task's own.
        """
        return AsyncStream(self, partial(self.asked, adapter, asked, base, sampling))

    def slang(
        self, context: str | None = None, condition: str | None = None, *, base: bool = False, **sampling: Any
    ) -> "AsyncStream":
        """A slang term for a scene; the task's own where None."""
        return self.ask("slang", given(context=context, condition=condition), base=base, **sampling)

    def chat(
        self,
        messages: Sequence[Message],
        adapter: str | None = "chat",
        *,
        base: bool = False,
        forget: bool = False,
        **sampling: Any,
    ) -> "AsyncStream":
        """The answer to the last of `messages`, `{"role", "content"}` in turn after one system message at most.

        Args:
            adapter: None asks the base alone in Gemma's own turns; with `base` it is asked in the adapter's.
            forget: leave out the oldest exchanges of a dialogue that does not fit in the model's window; otherwise it
                is `TooLong`. `Answer.forgotten` says how many.
        """
        return AsyncStream(self, partial(self.said, adapter, messages, base, sampling, forget))

    async def close(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # What `Client` shares: requests to be, each written when it is sent.
    async def plain(self, text: str, adapter: str | None, sampling: Mapping[str, Any]) -> Request:
        return Request(text, dict(sampling) if adapter is None else {**sampling, "lora_name": adapter})

    async def asked(
        self, name: str, asked: str | Mapping[str, str], base: bool, sampling: Mapping[str, Any]
    ) -> Request:
        adapter = await self.adapter(name)
        return adapter.request(adapter.write(asked), base, sampling)

    async def said(
        self, name: str | None, messages: Sequence[Message], base: bool, sampling: Mapping[str, Any], forget: bool
    ) -> Request:
        adapter = BASE if name is None else await self.adapter(name)
        return adapter.dialogue(messages, base or name is None, sampling, forget)

    async def adapter(self, name: str) -> Adapter:
        """What is served as `name`, a few seconds old at most."""
        read, known = self._known.get(name, (-math.inf, None))
        if known is None or time.monotonic() - read > CATALOGUE_SECONDS:
            known = next((adapter for adapter in await self._catalogue(name) if adapter.name == name), None)
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
                raise ServingError(f"{self.url}: its catalogue cannot be read ({error})") from None

        try:
            return await self._retried(ask, lambda: True)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.url}: no catalogue within {self._token_deadline:g} s") from None

    async def run(self, request: Callable[[], Awaitable[Request]], answer: Answer, show: Callable[[str], None]) -> None:
        """Send `request` and fill `answer` with what comes, each part given to `show` too. What the streams run on."""
        try:
            async with asyncio.timeout(self._deadline):
                asked = await request()
                while True:
                    send = partial(self._receive, asked.text, _checked(asked), answer, show)
                    try:
                        await self._retried(send, lambda: not answer.output_tokens)
                        break
                    except TooLong:  # the server counts the tokens
                        if asked.shorter is None:
                            raise
                        asked = asked.shorter()
                        answer.forgotten += 1
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self.url}: the answer was not complete within {self._deadline:g} s; ask for "
                f"fewer tokens, or give it a longer deadline"
            ) from None
        if asked.prompt:
            answer.fields = asked.prompt.read_response(answer.text)

    async def _receive(self, text: str, sampling: str, answer: Answer, show: Callable[[str], None]) -> None:
        async with aclosing(self._transport.parts(text, sampling)) as parts:
            reason = None
            while True:
                wait = self._token_deadline if answer.output_tokens else self._first_token_deadline
                try:
                    async with asyncio.timeout(wait):
                        part = await anext(parts, None)
                except TimeoutError:
                    which = "next" if answer.output_tokens else "first"
                    raise DeadlineExceeded(
                        f"{self.url}: the {which} token did not come within {wait:g} s; the "
                        f"server hangs or has too much to do"
                    ) from None
                if part is None:
                    break
                answer.text += part.text
                answer.input_tokens, reason = part.input_tokens, part.finish_reason
                answer.output_tokens += part.output_tokens
                if part.text:
                    show(part.text)
        if reason is None:
            raise Unavailable(f"{self.url}: the answer broke off")
        answer.finish_reason = reason

    async def _retried(self, send: Callable[[], Coroutine[Any, Any, T]], may_retry: Callable[[], bool]) -> T:
        """`send()`, again with growing pauses while the server is busy or away and nothing was answered."""
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
    """An answer on its way: iterate over its parts, or await it whole. It is asked for at once.

    Leaving `async with`, or dropping the last reference, cancels what is left, in the engine too.
    """

    def __init__(self, client: AsyncClient, request: Callable[[], Awaitable[Request]]) -> None:
        self._answer = Answer()
        self._parts: asyncio.Queue[str | None] = asyncio.Queue()
        self._task = asyncio.ensure_future(client.run(request, self._answer, self._parts.put_nowait))
        parts = self._parts
        self._task.add_done_callback(lambda task: parts.put_nowait(None))

    @property
    def answer(self) -> Answer:
        """What has come so far; all of it when the iteration is over."""
        return self._answer

    def cancel(self) -> None:
        """End the answer here; the iteration ends without an error, and what has come is in `answer`."""
        self._task.cancel()

    def __await__(self) -> Generator[Any, Any, Answer]:
        return self._whole().__await__()

    async def _whole(self) -> Answer:
        try:
            await asyncio.wait([self._task])
        finally:
            self._task.cancel()
        if not self._task.cancelled():
            self._task.result()
        return self._answer

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        part = await self._parts.get()
        if part is not None and not self._task.cancelling():
            return part
        self._parts.put_nowait(None)  # for whoever asks again
        if not self._task.cancelling():
            self._task.result()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    def __del__(self) -> None:
        if not self._task.done():
            self._task.cancel()
        elif not self._task.cancelled():
            self._task.exception()  # or asyncio reports one that nobody looked at


def _checked(request: Request) -> str:
    """The sampling parameters of a request as JSON.

    Raises:
        InvalidRequest: they, or its text, are not to be sent at all.
    """
    try:
        check_prompt(request.text)
        return json.dumps(request.sampling, allow_nan=False)
    except RequestError as error:
        raise InvalidRequest(error.sentence) from None
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"sampling parameters: {error}") from None


def given(**fields: str | None) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value is not None}
