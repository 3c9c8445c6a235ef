"""Rate limits by token bucket, and whose bucket a request takes from: shared by the gateway and the website."""

import ipaddress
import time
from collections import OrderedDict
from typing import NamedTuple

from starlette.types import Scope

MOST_KEYS = 10_000  # remembered at most; the longest unused is forgotten


class Rate(NamedTuple):
    """`burst` requests at once, and `per_minute` over time."""

    per_minute: float
    burst: float


class RateLimiter:
    """A token bucket for each key, full at first and refilled with time (the system's monotonic clock)."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key: tokens left, time of that count

    def take(self, key: str, rate: Rate, tokens: float = 1) -> float:
        """Take `tokens` from the bucket of `key` if it holds at least one; 0 only looks.

        Returns:
            0, or the seconds until the bucket holds one token; then nothing was taken.
        """
        now = time.monotonic()
        left, then = self._buckets.pop(key, (rate.burst, now))
        left = min(rate.burst, left + (now - then) * rate.per_minute / 60)
        self._buckets[key] = (left - tokens if left >= 1 else left), now
        if len(self._buckets) > MOST_KEYS:
            self._buckets.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) * 60 / rate.per_minute


def client_of(scope: Scope) -> str:
    """The address that a request's limits are counted by: an IPv4 address, or the /64 that one IPv6 customer has."""
    host = scope["client"][0] if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network(f"{host}/64", strict=False)) if address.version == 6 else host
