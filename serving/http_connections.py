"""Limits of HTTP connections that uvicorn has no settings for: of their time, and of their number from one address.

    uvicorn.Config(app, http=LimitedConnection, limit_concurrency=500, timeout_keep_alive=KEEP_ALIVE_SECONDS)

A connection that sends no request, half a header, half a body, or reads nothing of its answer is closed after a while.
With `limit_concurrency` connections, a new one takes the place of one without a request: of the address with the most
of them, the one that has waited longest. One address has at most half of them; more are refused while all of its have
requests.
"""

import asyncio
import time
from collections import Counter
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from serving.rate_limit import client_of

HEADER_SECONDS = 10.0  # for a request's header to arrive, after the connection or its first byte
BODY_SECONDS = 40.0  # for its body; what serves it may be stricter, and say so
READ_SECONDS = 60.0  # in which a client has to read something of an answer that waits for it
LAST_SECONDS = 1.0  # for a client to read what was sent before its connection is closed
KEEP_ALIVE_SECONDS = 75  # without a request; longer than the pools of common clients and proxies keep a connection
MOST_HEADER = 1 << 16  # bytes
TOO_MANY = b"too many connections from this address; close some, or use one for several requests\n"
REFUSAL = (
    b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: text/plain; charset=utf-8\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(TOO_MANY), TOO_MANY)
)


class LimitedConnection(AutoHTTPProtocol):  # of httptools where it is installed
    """One connection to uvicorn.

    Attributes:
        address: of the client, as its limits are counted.
        idle_since: when it was opened, or last had a request (monotonic clock).
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.address, self.idle_since = "", time.monotonic()
        self._awaited = 0.0  # seconds that the client has for what it sends just now; 0: nothing is awaited
        self._is_refused = False
        self._header = 0  # bytes of a header that is not complete
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def _reads_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.address = client_of({"type": "http", "client": self.client})
        self._await(HEADER_SECONDS)
        limit = self.limit_concurrency
        if limit is None:
            return
        addresses = Counter(one.address for one in self.connections)
        own = addresses[self.address] > limit // 2
        if not own and len(self.connections) < limit:
            return
        idle = [one for one in self.connections if one is not self and one.is_idle]
        if own:
            idle = [one for one in idle if one.address == self.address]
        if idle:
            max(idle, key=lambda one: (addresses[one.address], -one.idle_since)).close()
        elif own:
            self._is_refused = True
            self.connections.discard(self)
            self.transport.write(REFUSAL)
            self.transport.write_eof()  # to close at once would take the refusal from a client that is still sending
            self._await(LAST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(0)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        had_body = self._reads_body
        super().data_received(data)
        if self._reads_body:  # perhaps what is left of one that was refused by its header
            self._header = 0
            self._await(BODY_SECONDS)
            return
        if not self.is_idle or had_body:
            self._header = 0
            self._await(self.timeout_keep_alive if self.is_idle else 0)
            return
        self._header += len(data)
        self._await(HEADER_SECONDS)
        if self._header > MOST_HEADER:
            self.close()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.cycle.more_body = False  # uvicorn (0.54) leaves it where the answer came before the body's end

    def on_response_complete(self) -> None:
        self.idle_since = time.monotonic()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        self.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread:
            self._unread.cancel()
            self._unread = None

    def close(self) -> None:
        self.connections.discard(self)  # it counts no longer, though its transport closes a moment later
        self.transport.close()
        self.loop.call_later(LAST_SECONDS, self.transport.abort)  # the end of an answer that nobody reads

    def _await(self, seconds: float) -> None:
        """Close the connection in `seconds`, unless something else is awaited by then."""
        if seconds != self._awaited:
            self._awaited = seconds
            if self._late:
                self._late.cancel()
            self._late = self.loop.call_later(seconds, self.close) if seconds else None
