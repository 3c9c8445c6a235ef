"""The client for programs without an event loop: `AsyncClient` in a thread of its own."""

import asyncio
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, overload

from .adapter import Adapter, Answer, Message, PreparedRequest
from .async_client import DEFAULT_URL, AsyncClient
from .errors import ServingError
from .prompt import AnswerPart

T = TypeVar("T")


class Client:
    """`AsyncClient` without an event loop: the same arguments and methods, for any number of threads.

        with Client("127.0.0.1:8001") as client:
            print(client.ask("slang", context="You missed the last bus home.").text)

    With `stream=True` the answer comes as a `Stream`. The client runs one thread of its own until it is closed.
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
        self._client = AsyncClient(
            url,
            headers=headers,
            ca_file=ca_file,
            first_token_deadline=first_token_deadline,
            token_deadline=token_deadline,
            deadline=deadline,
            retry_for=retry_for,
        )
        self._loop, self._lock, self._closed = asyncio.new_event_loop(), threading.Lock(), False
        thread = threading.Thread(target=_run_loop, args=[self._loop], name=f"client of {url}", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end_loop, self._loop, thread, self._client)

    def adapters(self) -> list[Adapter]:
        """The adapters that are served beside the base model."""
        return self._wait(self._client.adapters())

    def is_ready(self) -> bool:
        """Whether the server reports itself ready; False where nothing answers."""
        return self._wait(self._client.is_ready())

    def generate(self, text: str | Sequence[int], adapter: str | None = None, **sampling: Any) -> Answer:
        """Continue `text` as it is; see `AsyncClient.stream`."""
        return self._answer(partial(self._client.prepare_text, text, adapter, sampling))

    def stream(self, text: str | Sequence[int], adapter: str | None = None, **sampling: Any) -> "Stream":
        """As `generate`, piece by piece."""
        return self._stream(partial(self._client.prepare_text, text, adapter, sampling))

    @overload
    def ask(
        self,
        adapter: str,
        question: str | Mapping[str, str] | None = ...,
        *,
        stream: Literal[False] = ...,
        base: bool = ...,
        **fields_and_sampling: Any,
    ) -> Answer: ...

    @overload
    def ask(
        self,
        adapter: str,
        question: str | Mapping[str, str] | None = ...,
        *,
        stream: Literal[True],
        base: bool = ...,
        **fields_and_sampling: Any,
    ) -> "Stream": ...

    def ask(
        self,
        adapter: str,
        question: str | Mapping[str, str] | None = None,
        *,
        stream: bool = False,
        base: bool = False,
        **fields_and_sampling: Any,
    ) -> "Answer | Stream":
        """Ask a task's adapter; see `AsyncClient.ask`."""
        prepare = partial(self._client.prepare_question, adapter, question, base, fields_and_sampling)
        return self._stream(prepare) if stream else self._answer(prepare)

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        adapter: str | None = ...,
        *,
        stream: Literal[False] = ...,
        base: bool = ...,
        forget: bool = ...,
        thinking: bool = ...,
        tools: Sequence[Mapping[str, Any]] = ...,
        **sampling: Any,
    ) -> Answer: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        adapter: str | None = ...,
        *,
        stream: Literal[True],
        base: bool = ...,
        forget: bool = ...,
        thinking: bool = ...,
        tools: Sequence[Mapping[str, Any]] = ...,
        **sampling: Any,
    ) -> "Stream": ...

    def chat(
        self,
        messages: Sequence[Message],
        adapter: str | None = "chat",
        *,
        stream: bool = False,
        base: bool = False,
        forget: bool = False,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        **sampling: Any,
    ) -> "Answer | Stream":
        """Answer the last of `messages`; see `AsyncClient.chat`."""
        prepare = partial(self._client.prepare_dialogue, adapter, messages, base, sampling, forget, thinking, tools)
        return self._stream(prepare) if stream else self._answer(prepare)

    def close(self) -> None:
        """Cancel what is still being generated, and end the connection and the thread."""
        with self._lock:  # what was submitted earlier is in the loop's queue, ahead of its end
            self._closed = True
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, prepare: Callable[[], Awaitable[PreparedRequest]]) -> Answer:
        answer = Answer()
        _result(self._submit(self._client.run(prepare, answer, lambda text: None)))
        return answer

    def _stream(self, prepare: Callable[[], Awaitable[PreparedRequest]]) -> "Stream":
        answer, parts = Answer(), queue.SimpleQueue[AnswerPart | None]()
        return Stream(self, self._submit(self._client.run(prepare, answer, parts.put)), answer, parts)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return _result(self._submit(coroutine))

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        with self._lock:
            if self._closed:
                coroutine.close()
                raise ServingError(f"this client of {self.url} is closed")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


class Stream:
    """An answer that is being generated: iterate over its text piece by piece.

    The request is sent at once. Leaving `with`, or dropping the last reference, cancels it in the engine too.
    """

    def __init__(
        self, client: Client, future: "Future[None]", answer: Answer, parts: "queue.SimpleQueue[AnswerPart | None]"
    ) -> None:
        self._client, self._future, self._answer, self._parts = client, future, answer, parts  # the client stays open
        future.add_done_callback(lambda _: parts.put(None))

    @property
    def answer(self) -> Answer:
        """What has arrived so far; complete when the iteration is over."""
        return self._answer

    def cancel(self) -> None:
        """Stop generating; the iteration ends without an error, and `answer` keeps what has arrived."""
        self._future.cancel()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while (part := self.part()) is not None:
            if part.text:
                return part.text
        raise StopIteration

    def part(self) -> AnswerPart | None:
        """The next piece, of the answer or of the thought before it; None at the end."""
        part = self._parts.get()
        if part is not None and not self._future.cancelled():
            return part
        self._parts.put(None)  # for another call after the end
        if not self._future.cancelled():
            self._future.result()
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()


def _result(future: "Future[T]") -> T:
    """Wait for what runs in the client's thread; Ctrl-C while waiting cancels it."""
    try:
        return future.result()
    except CancelledError:
        raise ServingError("the client was closed before the answer was complete") from None
    except BaseException:
        future.cancel()
        raise


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: AsyncClient) -> None:
    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
    if threading.current_thread() is not thread:  # where an unreferenced client may be collected too
        thread.join()
