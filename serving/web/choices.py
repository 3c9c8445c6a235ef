"""Several answers to one question, of which the visitor chooses: coin many, show few.

The answers differ in their seeds alone, so that the engine computes their prompt once and their tokens together. As
soon as the first part of one is complete (of slang, the term), the page of the task says whether it may be offered; if
not, or if enough are offered already, the answer is cancelled: a dozen terms cost little more than the few answers that
are written to their end.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from data_prep.clean_text import key_of
from serving.client import Adapter, AsyncStream, ServingError
from serving.web.page import Page
from serving.web.settings import Settings
from serving.web.shown import Shown

MALFORMED = "incomplete"
ENOUGH = "more than asked for"
SEEDS = 2**31  # seeds are below


def seed_of(first: int, number: int) -> int:
    """The seed of the answer with this number, by which it can be had again alone."""
    return (first + number) % SEEDS


class Choices:
    """What is offered to one visitor.

    Args:
        asked: the fields of the prompt, the task's own where the visitor left them empty.
        seed: of the first answer.
        wanted: how many are offered at most.
        emit: takes the name of an event and its data, see answers.py.
    """

    def __init__(
        self,
        page: Page,
        settings: Settings,
        adapter: Adapter,
        asked: Mapping[str, str],
        seed: int,
        wanted: int,
        emit: Callable[..., None],
    ) -> None:
        self._page, self._settings, self._adapter, self._asked = page, settings, adapter, asked
        self._seed, self._wanted, self._emit = seed, wanted, emit
        self._offered: dict[int, str] = {}  # number of an answer: the key of its first part
        self._complete = self._tokens = 0
        self._dropped = Counter[str]()

    async def ask(self, stream: Callable[[int], AsyncStream]) -> dict[str, Any]:
        """Ask with every seed of the page, by `stream(seed)`, and return what `done` says of them all.

        Raises:
            ServingError: nothing could be offered, as the server did not answer to the end.
        """
        numbers = range(self._page.seeds)
        ended = await asyncio.gather(
            *(self._follow(number, stream(seed_of(self._seed, number))) for number in numbers), return_exceptions=True
        )
        failures = [error for error in ended if isinstance(error, BaseException)]
        for error in failures:
            if not self._complete or not isinstance(error, ServingError):
                raise error
        for number, failed in zip(numbers, ended, strict=True):
            if failed:
                self._drop(number, "broken off")
        return {
            "choices": self._complete,
            "asked": len(numbers),
            "dropped": dict(self._dropped.most_common()),
            "tokens": self._tokens,
        }

    async def _follow(self, number: int, stream: AsyncStream) -> None:
        shown, fields = Shown(self._settings.clean), dict[str, str]()
        async with stream, aclosing(_texts(stream, shown)) as texts:
            async for text in texts:
                fields = self._page.tidy(self._adapter.prompt.read_response(shown.text))
                if number in self._offered:
                    self._emit("part", choice=number, text=text, fields=fields)
                elif len(fields) > 1:  # the first part ends where the second begins
                    if why := self._why_not(fields):
                        self._tokens += stream.answer.output_tokens
                        return self._drop(number, why)
                    self._offered[number] = _first(fields)
                    self._emit("part", choice=number, text=shown.text, fields=fields)
        self._tokens += stream.answer.output_tokens
        if not self._adapter.prompt.has_all_parts(fields):
            return self._drop(number, MALFORMED)
        self._complete += 1
        more = {}
        if self._page.answered:
            more = self._page.answered(self._settings, self._adapter, self._asked, fields)
        self._emit("choice", choice=number, seed=seed_of(self._seed, number), **more)

    def _why_not(self, fields: Mapping[str, str]) -> str:
        refuses = self._page.refuses
        if why := refuses(self._settings, self._adapter, self._asked, fields) if refuses else "":
            return why
        if _first(fields) in self._offered.values():
            return "said already"
        return ENOUGH if len(self._offered) >= self._wanted else ""

    def _drop(self, number: int, why: str) -> None:
        self._dropped[why] += 1
        if self._offered.pop(number, None) is not None:
            self._emit("dropped", choice=number, why=why)


def _first(fields: Mapping[str, str]) -> str:
    return key_of(next(iter(fields.values())))


async def _texts(stream: AsyncStream, shown: Shown) -> AsyncGenerator[str]:
    while (part := await stream.part()) is not None:
        if text := shown.add(part.text):
            yield text
    if text := shown.rest():
        yield text
