"""Ask a served model: by task, in a dialogue or with a plain text; whole or word by word; never waiting for ever.

    from serving.client import Client

    with Client("127.0.0.1:8001") as client:  # gRPC; grpcs://…, http://127.0.0.1:8000 and https://… too
        print(client.slang(context="You missed the last bus home.").text)
        for part in client.chat([{"role": "user", "content": "Hi!"}], stream=True):
            print(part, end="", flush=True)

    async with AsyncClient() as client:
        answer = await client.ask("squid_game", "Is it violent?")
        async for part in client.ask("squid_game", "Is it violent?"): ...

The prompt of a task comes from the server, with the adapter, and is written by `core.prompt`: a model is asked as
it was trained. `python -m serving.client --help` is the same from the command line (`client_command.py`).
"""

import asyncio
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, Literal, Self, TypeVar, overload

from serving.adapter import BASE, Adapter, Answer, Message, Request
from serving.async_client import DEFAULT_URL, AsyncClient, AsyncStream, given
from serving.errors import Busy, DeadlineExceeded, InvalidRequest, ServingError, TooLong, Unavailable, UnknownAdapter

__all__ = [
    "BASE",
    "DEFAULT_URL",
    "Adapter",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Busy",
    "Client",
    "DeadlineExceeded",
    "InvalidRequest",
    "ServingError",
    "Stream",
    "TooLong",
    "Unavailable",
    "UnknownAdapter",
]
T = TypeVar("T")


class Client:
    """`AsyncClient` for programs without an event loop: the same methods, from any number of threads.

    Where `stream` is true the answer comes as a `Stream` of parts. It works in one thread of its own until `close`.
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        self.url = url
        self._client = AsyncClient(url, **options)
        self._loop, self._lock, self._closed = asyncio.new_event_loop(), threading.Lock(), False
        thread = threading.Thread(target=_run_loop, args=[self._loop], name=f"client of {url}", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end_loop, self._loop, thread, self._client)

    def adapters(self) -> list[Adapter]:
        return self._wait(self._client.adapters())

    def is_ready(self) -> bool:
        return self._wait(self._client.is_ready())

    def generate(self, text: str, adapter: str | None = None, **sampling: Any) -> Answer:
        return self._ask(partial(self._client.plain, text, adapter, sampling), False)

    def stream(self, text: str, adapter: str | None = None, **sampling: Any) -> "Stream":
        return self._ask(partial(self._client.plain, text, adapter, sampling), True)

    @overload
    def ask(
        self,
        adapter: str,
        asked: str | Mapping[str, str],
        *,
        stream: Literal[False] = ...,
        base: bool = ...,
        **sampling: Any,
    ) -> Answer: ...

    @overload
    def ask(
        self, adapter: str, asked: str | Mapping[str, str], *, stream: Literal[True], base: bool = ..., **sampling: Any
    ) -> "Stream": ...

    def ask(
        self, adapter: str, asked: str | Mapping[str, str], *, stream: bool = False, base: bool = False, **sampling: Any
    ) -> "Answer | Stream":
        return self._ask(partial(self._client.asked, adapter, asked, base, sampling), stream)

    @overload
    def slang(
        self,
        context: str | None = ...,
        condition: str | None = ...,
        *,
        stream: Literal[False] = ...,
        base: bool = ...,
        **sampling: Any,
    ) -> Answer: ...

    @overload
    def slang(
        self,
        context: str | None = ...,
        condition: str | None = ...,
        *,
        stream: Literal[True],
        base: bool = ...,
        **sampling: Any,
    ) -> "Stream": ...

    def slang(
        self,
        context: str | None = None,
        condition: str | None = None,
        *,
        stream: bool = False,
        base: bool = False,
        **sampling: Any,
    ) -> "Answer | Stream":
        fields = given(context=context, condition=condition)
        return self._ask(partial(self._client.asked, "slang", fields, base, sampling), stream)

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        adapter: str | None = ...,
        *,
        stream: Literal[False] = ...,
        base: bool = ...,
        forget: bool = ...,
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
        **sampling: Any,
    ) -> "Answer | Stream":
        return self._ask(partial(self._client.said, adapter, messages, base, sampling, forget), stream)

    def close(self) -> None:
        """End what is still on its way, the connection and the thread."""
        with self._lock:  # what was submitted before is in the loop's queue, ahead of the end
            self._closed = True
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: Callable[[], Awaitable[Request]], stream: bool) -> Any:
        answer, parts = Answer(), queue.SimpleQueue[str | None]()
        future = self._submit(self._client.run(request, answer, parts.put if stream else lambda part: None))
        if stream:
            return Stream(self, future, answer, parts)
        _result(future)
        return answer

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return _result(self._submit(coroutine))

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        with self._lock:
            if self._closed:
                coroutine.close()
                raise ServingError(f"this client of {self.url} is closed")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


class Stream:
    """An answer on its way: iterate over its parts. It is asked for at once.

    Leaving `with`, or dropping the last reference, cancels what is left, in the engine too.
    """

    def __init__(
        self, client: Client, future: "Future[None]", answer: Answer, parts: "queue.SimpleQueue[str | None]"
    ) -> None:
        self._client, self._future, self._answer, self._parts = client, future, answer, parts  # the client stays open
        future.add_done_callback(lambda _: parts.put(None))

    @property
    def answer(self) -> Answer:
        """What has come so far; all of it when the iteration is over."""
        return self._answer

    def cancel(self) -> None:
        """End the answer here; the iteration ends without an error, and what has come is in `answer`."""
        self._future.cancel()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        part = self._parts.get()
        if part is not None and not self._future.cancelled():
            return part
        self._parts.put(None)  # for whoever asks again
        if not self._future.cancelled():
            self._future.result()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()


def _result(future: "Future[T]") -> T:
    """The result of what runs in the client's thread; Ctrl-C while waiting cancels it."""
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
    if threading.current_thread() is not thread:  # where a forgotten client may be collected too
        thread.join()


if __name__ == "__main__":
    from serving.client_command import main

    main()
