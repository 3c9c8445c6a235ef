"""What the gateway answers with beside whole answers: events, refusals, and what it says when it is stopped."""

from collections.abc import AsyncIterator, Callable

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.openai_api import ApiError

GONE = 499  # nginx's status for a client that has disconnected
STOPPED = "the server was stopped before the answer was complete; ask again"


class Events(StreamingResponse):
    """Server-sent events; `end` is called when they are over, however they end."""

    def __init__(self, events: AsyncIterator[str] | AsyncIterator[bytes], end: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # nginx would hold the pieces back
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


async def until_gone(request: Request) -> None:
    """Wait until who sent `request`, whose body has been read, is no longer there for its answer."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
