"""Several answers to one request: `n` of them, or one for each of several prompts, in one stream."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.client import Answer, AnswerPart, AsyncStream
from serving.protocol import CANCELLED


class ChoicePart(AnswerPart):
    """A piece of the answer `number`."""

    number: int = 0


@dataclass
class Answers(Answer):
    """All of them, with their tokens together; `each` has them one by one."""

    each: list[Answer] = field(default_factory=list)


class Choices(AsyncStream):
    """Iterates over the pieces of all answers as they come. An error of one ends all.

    Args:
        streams: of the answers, those of a prompt beside one another.
        n: how many answers a prompt has; its tokens count once.
    """

    def __init__(self, streams: Sequence[AsyncStream], n: int) -> None:
        self._streams, self._n = streams, n
        self._parts: asyncio.Queue[AnswerPart | None] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._collect())
        parts = self._parts
        self._task.add_done_callback(lambda task: parts.put_nowait(None))

    @property
    def answer(self) -> Answers:
        each = [stream.answer for stream in self._streams]
        reasons = [one.finish_reason for one in each]
        return Answers(
            text="\n".join(one.text for one in each),
            finish_reason=CANCELLED if CANCELLED in reasons else reasons[0],
            input_tokens=sum(one.input_tokens for one in each[:: self._n]),
            output_tokens=sum(one.output_tokens for one in each),
            each=each,
        )

    async def _collect(self) -> None:
        tasks = [asyncio.ensure_future(self._forward(*one)) for one in enumerate(self._streams)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for stream, task in zip(self._streams, tasks, strict=True):
                stream.cancel()
                task.cancel()
            await asyncio.wait(tasks)

    async def _forward(self, number: int, stream: AsyncStream) -> None:
        while (part := await stream.part()) is not None:
            piece = ChoicePart(*part)
            piece.number = number
            self._parts.put_nowait(piece)
