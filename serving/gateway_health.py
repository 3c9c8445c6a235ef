"""Whether the server behind the gateway is well: what /health says."""

import asyncio
import time
from typing import Any

from serving.adapter_check import changes_nothing
from serving.client import AsyncClient, Busy, DeadlineExceeded, ServingError
from serving.gateway_records import log
from serving.openai_api import ApiError

HEALTH_SECONDS = 1.0  # for which an answer of /health is cached
HANGS_SECONDS = 15.0  # without a step or a token while there are requests; the supervisor waits as long
DOES_NOTHING = "answers as the base does: it is empty, or the engine ignores it"


class Health:
    """The health of one server.

    Args:
        client: sends the requests of callers.
        probe: sends those of /health, with a deadline of its own.
        is_checked: whether `check_adapters` has nothing to do.
    """

    def __init__(self, client: AsyncClient, probe: AsyncClient, is_checked: bool) -> None:
        self._client, self._probe = client, probe
        self._latest: tuple[float, int, dict[str, Any]] = (float("-inf"), 0, {})
        # The body of /health while the adapters are checked, or if one does nothing.
        self._unfit: dict[str, Any] | None = None if is_checked else {"status": "checking adapters"}
        self._probing = asyncio.Lock()

    async def check_adapters(self) -> None:
        """Compare each adapter with the base once the server is ready; /health fails until all are found to differ.

        A server whose adapter does nothing must not take the place of one that works: it would answer, wrongly.
        """
        while not await self._client.is_ready():
            await asyncio.sleep(1)
        wrong = []
        for adapter in await self._client.adapters():
            try:
                if await changes_nothing(self._client, adapter.name):
                    wrong.append(f"adapter {adapter.name} {DOES_NOTHING}")
            except ServingError as error:
                wrong.append(f"adapter {adapter.name} cannot be asked: {ApiError.of(error).message}")
        for sentence in wrong:
            log.error(sentence)
        self._unfit = {"status": "wrong adapters", "error": "; ".join(wrong)} if wrong else None

    async def now(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health, at most `HEALTH_SECONDS` old: whether a token can be generated.

        Where it takes long, as behind a long prompt, a server that moves is "busy", which is well.
        """
        if self._unfit:
            return 503, self._unfit
        async with self._probing:
            if time.monotonic() - self._latest[0] > HEALTH_SECONDS:
                begin = time.monotonic()
                try:
                    await self._probe.generate("Hello", max_tokens=1, temperature=0)
                    found = 200, {"status": "ok", "seconds": round(time.monotonic() - begin, 4)}
                except ServingError as error:
                    found = 503, {"status": "failing", "error": ApiError.of(error).message}
                    slow = isinstance(error, DeadlineExceeded)
                    if isinstance(error, Busy) or (slow and await self._client.is_moving(HANGS_SECONDS)):
                        found = 200, {"status": "busy"}  # with the requests of others
                self._latest = (time.monotonic(), *found)
            return self._latest[1:]
