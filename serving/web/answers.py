"""POST /api/answer: a question in, the model's answer out as server-sent events, the base model's beside it if wanted.

Events, each with a JSON object:
    part     {"side": "after"|"before", "text": delta, "fields": {name: text so far}}   fields: where answers have parts
    waiting  {"seconds": n}                                   nothing came for a while; it is being waited for
    done     {"side", "finish_reason", "tokens", "seconds", "keep", "forgotten"}
             keep: the token by which dictionary.py keeps it, or null; forgotten: exchanges that were too old to be read
    error    {"side", "message", "kind"}                      in words for a visitor; the other side goes on
A stream that ends without `done` or `error` of a side was cut. Closing the connection cancels in the engine.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field, StringConstraints, model_validator

from data_prep.clean_text import is_explicit, mask_explicit
from serving.client import (
    Answer,
    AsyncClient,
    AsyncStream,
    Busy,
    DeadlineExceeded,
    InvalidRequest,
    ServingError,
    TooLong,
    Unavailable,
    UnknownAdapter,
)
from serving.web.dictionary import Dictionary, Entry

WAITING = 3.0  # seconds of silence after which a visitor is told that it goes on
LONGEST_TERM = 6  # words, of the lists behind mask_explicit
SAYS = {
    Busy: "Many people are asking right now. Try again in a few seconds.",
    Unavailable: "The model is not there at the moment: it is starting, or has just stopped. "
    "What you typed is kept; try again in a few seconds.",
    UnknownAdapter: "This model is not being served at the moment. Choose another one.",
    DeadlineExceeded: "The model took too long to answer. Try again, or ask for less.",
    TooLong: "This is more than the model can read at once. Make it shorter.",
    InvalidRequest: "The model cannot take this: ",
    ServingError: "Something went wrong on our side. It has been noted; try again.",
}
router = APIRouter()
log = logging.getLogger(__name__)
Text = Annotated[str, StringConstraints(max_length=4000)]


class Message(BaseModel):
    role: Literal["user", "assistant"]
    content: Text


class Question(BaseModel):
    """What is asked of an adapter: values of its prompt's fields, or a dialogue, which the base alone may be asked too.

    Attributes:
        seed, temperature: with the same adapter and texts they give the same answer again.
        compare: ask the base model the same.
    """

    adapter: str | None = Field(max_length=64)
    fields: dict[Annotated[str, StringConstraints(max_length=64)], Text] | None = Field(None, max_length=8)
    messages: list[Message] | None = Field(None, min_length=1, max_length=60)
    seed: int = Field(ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    compare: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "Question":
        if (self.fields is None) == (self.messages is None) or (self.adapter is None and self.messages is None):
            raise ValueError("give either fields of an adapter or messages")
        return self

    def asked(self) -> str:
        """All that the visitor wrote."""
        return "\n".join([*(self.fields or {}).values(), *(message.content for message in self.messages or [])])


@router.post("/api/answer", response_class=EventSourceResponse)
async def answer(question: Question, request: Request) -> AsyncIterator[ServerSentEvent]:
    client, settings = request.app.state.client, request.app.state.settings
    if settings.clean and is_explicit(question.asked()):
        yield _event(
            "error", side="after", message="This site keeps it clean. Please say it in other words.", kind="explicit"
        )
        return
    sides = ["after", "before"] if question.compare else ["after"]
    events: asyncio.Queue[ServerSentEvent] = asyncio.Queue()
    dictionary = request.app.state.dictionary
    tasks = [
        asyncio.create_task(_one_side(client, dictionary, question, side, settings.clean, events)) for side in sides
    ]
    began, going_on = time.monotonic(), len(sides)
    try:
        while going_on:
            try:
                event = await asyncio.wait_for(events.get(), WAITING)
            except TimeoutError:
                event = _event("waiting", seconds=round(time.monotonic() - began))
            if event.event == "error" and event.data["kind"] == Unavailable.code:
                request.app.state.served = None  # until app.py sees it again
            yield event
            going_on -= event.event in ("done", "error")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _one_side(
    client: AsyncClient, dictionary: Dictionary, question: Question, side: str, clean: bool, events: asyncio.Queue
) -> None:
    """Puts the events of one model's answer into `events`; every end of it is one of them."""
    began = time.monotonic()
    shown, fields = _Shown(clean), dict[str, str]()
    try:
        prompt = (await client.adapter(question.adapter)).prompt if question.adapter else None

        def show(text: str) -> None:
            if text:
                fields.update(prompt.read_response(shown.text) if prompt else {})
                events.put_nowait(_event("part", side=side, text=text, fields=fields.copy()))

        async with _ask(client, question, base=side == "before") as stream:
            async for part in stream:
                show(shown.add(part))
            show(shown.rest())
            said: Answer = stream.answer
        keep = None
        if side == "after" and prompt and question.fields is not None and {"slang", "description"} <= fields.keys():
            context = question.fields.get("context", "").strip() or prompt.fields.get("context", "")
            keep = dictionary.token_of(
                Entry(fields["slang"], fields["description"], fields.get("example", ""), context)
            )
        events.put_nowait(
            _event(
                "done",
                side=side,
                finish_reason=said.finish_reason,
                tokens=said.output_tokens,
                seconds=round(time.monotonic() - began, 2),
                keep=keep,
                forgotten=said.forgotten,
            )
        )
    except ServingError as error:
        kind = next(kind for kind in SAYS if isinstance(error, kind))
        detail = str(error).removeprefix(f"{client.url}: ") if kind is InvalidRequest else ""
        log.warning("answer failed: %s", kind.__name__)  # the text of an error may hold the prompt
        events.put_nowait(_event("error", side=side, message=SAYS[kind] + detail, kind=kind.code))
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__))
        log.error("answer failed: %s\n%s", type(error).__name__, where)
        events.put_nowait(_event("error", side=side, message=SAYS[ServingError], kind="internal"))


def _ask(client: AsyncClient, question: Question, base: bool) -> AsyncStream:
    sampling: dict[str, Any] = {"seed": question.seed}
    if question.temperature is not None:
        sampling["temperature"] = question.temperature
    if question.messages is not None or question.adapter is None:
        messages = [message.model_dump() for message in question.messages or []]
        return client.chat(messages, adapter=question.adapter, base=base, forget=True, **sampling)
    # An empty field is one that was not filled in: it takes the task's own value.
    fields = {name: value for name, value in (question.fields or {}).items() if value.strip()}
    return client.ask(question.adapter, fields, base=base, **sampling)


class _Shown:
    """What a visitor sees of a text that is still growing. With `clean`, explicit terms masked.

    Then the last words are held back until it is known whether they are part of such a term.

    Attributes:
        text: all that has been shown.
    """

    def __init__(self, clean: bool) -> None:
        self._clean, self._whole, self.text = clean, "", ""

    def add(self, part: str) -> str:
        """The text that is new to the visitor; "" while it is held back."""
        self._whole += part
        if not self._clean:
            return self._show(self._whole)
        words = self._whole.split(" ")
        return self._show(mask_explicit(self._whole)[: len(" ".join(words[:-LONGEST_TERM]))])

    def rest(self) -> str:
        return self._show(mask_explicit(self._whole) if self._clean else self._whole)

    def _show(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new


def _event(name: str, **data: Any) -> ServerSentEvent:
    return ServerSentEvent(event=name, data=data)
