"""Who sends the gateway's requests, and how much of it each caller may have: keys, rates, places, bodies."""

import asyncio
import hmac
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fastapi import Request

from serving.http_connections import KEEP_ALIVE_SECONDS
from serving.openai_api import ApiError
from serving.rate_limit import Rate, RateLimiter, client_of

BODY_SECONDS = 30.0  # for a request's body to arrive in
WRONG_KEYS = 10  # a minute from one address; more, and its requests are refused for a while, whatever their key
SHARE = 0.75  # of the concurrent answers that one caller may have, so that others find room


@dataclass(frozen=True)
class RequestLimits:
    """What is accepted.

    Attributes:
        body: bytes of a request.
        per_minute: requests of one caller a minute; 0: any number.
        concurrent: answers to all callers at once; one caller may have `SHARE` of them.
        keep_alive: seconds that a connection is kept without a request.
    """

    body: int = 1 << 20
    per_minute: float = 0
    concurrent: int = 128
    keep_alive: int = KEEP_ALIVE_SECONDS


class Callers:
    """The callers of one gateway.

    Args:
        keys: the accepted API keys; none: no key is required.
    """

    def __init__(self, limits: RequestLimits, keys: Sequence[str]) -> None:
        self._limits = limits
        self._keys = [key.encode() for key in keys]
        self._limiter = RateLimiter()
        self._open: Counter[str] = Counter()  # answers being generated, by caller

    def identify(self, request: Request) -> str:
        """Who sent the request: the number of its key, or its address where no key is required.

        Raises:
            ApiError: the key is missing or wrong, or too many wrong ones have come from this address.
        """
        address = client_of(request.scope)
        if not self._keys:
            return address
        guess = partial(
            self._take,
            f"wrong keys of {address}",
            per_minute=WRONG_KEYS,
            burst=WRONG_KEYS,
            refusal="too many wrong API keys from this address",
        )
        guess(0)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Compare with every key in constant time, so that the response time reveals nothing about them.
        right = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(right):
            if given:
                guess(1)
            raise ApiError(
                401,
                "the API key is missing or wrong; send one of SERVING_API_KEY as Authorization: Bearer KEY",
                "invalid_api_key",
            )
        return f"key {right.index(True) + 1}"

    def count(self, caller: str) -> None:
        """Count a request of `caller`.

        Raises:
            ApiError: it has sent more requests than it may.
        """
        if rate := self._limits.per_minute:
            self._take(caller, 1, rate, max(1.0, rate / 6), f"more than {rate:g} requests a minute")

    def _take(self, whose: str, count: int, per_minute: float, burst: float, refusal: str) -> None:
        """Take `count` from a bucket that holds `burst` and is filled `per_minute`.

        Raises:
            ApiError: `refusal`, as there is less than one in it.
        """
        if wait := self._limiter.take(whose, Rate(per_minute, burst), count):
            raise ApiError(429, refusal, "rate_limit_exceeded", retry_after=wait)

    def check_room(self, caller: str, answers: int = 1) -> None:
        """
        Raises:
            ApiError: there are no places for so many, or `caller` may not have them. More than there are at all may
                come while nobody has one.
        """
        most = self._limits.concurrent
        share = max(1, int(most * SHARE))
        if self._open.total() + answers > max(most, answers) or self._open[caller] + answers > max(share, answers):
            raise ApiError(429, "too many requests are being answered; try again shortly", "busy", retry_after=1)

    def enter(self, caller: str, answers: int = 1) -> None:
        """Take a place for each of the answers to a request, until `leave`."""
        self._open[caller] += answers

    def leave(self, caller: str, answers: int = 1) -> None:
        self._open[caller] -= answers
        self._open += Counter()  # forgets those at zero

    async def body(self, request: Request) -> bytes:
        """The request's body, whatever its transfer encoding.

        Raises:
            ApiError: it is too large, or late.
        """
        limit, body = self._limits.body, bytearray()
        too_large = ApiError(413, f"the request is larger than {limit:,} bytes", "request_too_large")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large  # before a byte of it is read
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:g} s") from None
        return bytes(body)
