"""POST /api/answer: streams the model's answer to a question as server-sent events, and the base model's on request.

Events, each with a JSON object:
    part     {"side": "after"|"before", "text": delta, "fields": {name: text so far}}   of labelled responses
    thought  {"side", "text": delta}                          what the model thinks before it answers
    waiting  {"seconds": n, "ahead": m}                       nothing has arrived for a while; still waiting, behind m
             questions that were asked here before and of which nothing has arrived either
    done     {"side", "finish_reason", "tokens", "seconds", "forgotten", and what the page of its task adds}
             forgotten: how many of the oldest exchanges did not fit in the model's window and were left out
    Where the visitor is to choose among several answers (serving/web/choices.py), each `part` of side "after" has the
    number of its answer, "choice", and there come
    choice   {"side", "choice", "seed", and what the page adds}    this one is complete and may be chosen
    dropped  {"side", "choice", "why"}                       this one was shown, and is none after all
    done     {"side", "choices": how many, "asked", "dropped": {why: how many}, "tokens", "seconds"}
    error    {"side", "message", "kind"}                      a sentence for the visitor; the other side goes on
A stream that ends without `done` or `error` for a side was cut off. Closing the connection cancels the generation.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field, StringConstraints, model_validator

from data_prep.clean_text import is_explicit
from serving.client import (
    Adapter,
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
from serving.web.choices import SEEDS, Choices
from serving.web.page import Page
from serving.web.settings import Settings
from serving.web.shown import Shown

WAITING = 3.0  # seconds of silence after which the visitor is told that the model is still at work
SAYS = {
    Busy: "Many people are asking right now. Try again in a few seconds.",
    Unavailable: "The model is not available at the moment: it is starting, or has just stopped. "
    "What you typed is kept; try again in a few seconds.",
    UnknownAdapter: "This model is not being served at the moment. What you typed is kept.",
    DeadlineExceeded: "The model took too long to answer. Try again, or ask for less.",
    TooLong: "This is more text than the model can read at once. Please shorten it.",
    InvalidRequest: "The model cannot take this: ",
    ServingError: "Something went wrong on our side and has been logged. Please try again.",
}
router = APIRouter()
log = logging.getLogger(__name__)
Text = Annotated[str, StringConstraints(max_length=4000)]


class VisitorMessage(BaseModel):
    role: Literal["user", "assistant"]
    content: Text


class AnswerRequest(BaseModel):
    """A question to an adapter: values for its prompt's fields, or a dialogue, which can go to the base model, too.

    Attributes:
        seed, temperature: the same values with the same adapter and texts give the same answer.
        thinking: let the model think before it answers, in a dialogue with one that can.
        compare: ask the base model as well.
        choices: how many answers to choose from, at most, where the page of the task offers choices.
    """

    adapter: str | None = Field(max_length=64)
    fields: dict[Annotated[str, StringConstraints(max_length=64)], Text] | None = Field(None, max_length=8)
    messages: list[VisitorMessage] | None = Field(None, min_length=1, max_length=60)
    seed: int = Field(ge=0, lt=SEEDS)
    temperature: float | None = Field(None, ge=0, le=2)
    thinking: bool = False
    compare: bool = False
    choices: int = Field(1, ge=1, le=3)

    @model_validator(mode="after")
    def _one_of_both(self) -> "AnswerRequest":
        if (self.fields is None) == (self.messages is None) or (self.adapter is None and self.messages is None):
            raise ValueError("give either fields of an adapter or messages")
        return self

    def filled_in(self) -> dict[str, str]:
        """The fields that are not empty; an empty one takes the task's own value."""
        return {name: value for name, value in (self.fields or {}).items() if value.strip()}

    def asked(self) -> str:
        """All that the visitor wrote."""
        return "\n".join([*(self.fields or {}).values(), *(message.content for message in self.messages or [])])


@router.post("/api/answer", response_class=EventSourceResponse)
async def answer(question: AnswerRequest, request: Request) -> AsyncIterator[ServerSentEvent]:
    client, settings = request.app.state.client, request.app.state.settings
    if settings.clean and is_explicit(question.asked()):
        yield _event(
            "error", side="after", message="This site keeps it clean. Please say it in other words.", kind="explicit"
        )
        return
    sides = ["after", "before"] if question.compare else ["after"]
    events: asyncio.Queue[ServerSentEvent] = asyncio.Queue()
    page = next((found.page for found in request.app.state.pages if found.page.task == question.adapter), None)
    tasks = [asyncio.create_task(_one_side(client, settings, page, question, side, events)) for side in sides]
    began, going_on = time.monotonic(), len(sides)
    waiting: dict[object, None] = request.app.state.waiting  # questions without a token yet, in the order they came
    place = object()
    waiting[place] = None
    try:
        while going_on:
            try:
                event = await asyncio.wait_for(events.get(), WAITING)
                waiting.pop(place, None)
            except TimeoutError:
                ahead = list(waiting).index(place) if place in waiting else 0
                event = _event("waiting", seconds=round(time.monotonic() - began), ahead=ahead)
            if event.event == "error" and event.data["kind"] == Unavailable.code:
                request.app.state.served = None  # until app.py sees it again
            yield event
            going_on -= event.event in ("done", "error")
    finally:
        waiting.pop(place, None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _one_side(
    client: AsyncClient,
    settings: Settings,
    page: Page | None,
    question: AnswerRequest,
    side: str,
    events: asyncio.Queue,
) -> None:
    """Put the events of one model's answer into `events`; the last of them is `done` or `error`."""
    began = time.monotonic()

    def emit(name: str, **data: Any) -> None:
        events.put_nowait(_event(name, side=side, **data))

    try:
        adapter = await client.adapter(question.adapter) if question.adapter else None
        of_task = page if adapter and side == "after" and question.fields is not None else None
        asked = {**adapter.prompt.fields, **question.filled_in()} if adapter else {}
        if of_task and adapter and of_task.seeds > 1 and question.choices > 1:
            choices = Choices(of_task, settings, adapter, asked, question.seed, question.choices, emit)
            done = await choices.ask(lambda seed: _ask(client, question, seed, base=False))
        else:
            fields, done = await _one_answer(
                _ask(client, question, question.seed, side == "before"), adapter, page, settings, emit
            )
            if of_task and of_task.answered and adapter:
                done |= of_task.answered(settings, adapter, asked, fields)
        emit("done", seconds=round(time.monotonic() - began, 2), **done)
    except ServingError as error:
        kind = next(kind for kind in SAYS if isinstance(error, kind))
        detail = str(error).removeprefix(f"{client.url}: ") if kind is InvalidRequest else ""
        log.warning("answer failed: %s", kind.__name__)  # the text of an error may hold the prompt
        emit("error", message=SAYS[kind] + detail, kind=kind.code)
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__))
        log.error("answer failed: %s\n%s", type(error).__name__, where)
        emit("error", message=SAYS[ServingError], kind="internal")


async def _one_answer(
    stream: AsyncStream, adapter: Adapter | None, page: Page | None, settings: Settings, emit: Callable[..., None]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Emit an answer as it comes. Returns its fields, and what `done` says of it."""
    shown, thought, fields = Shown(settings.clean), Shown(settings.clean), dict[str, str]()

    def show(text: str) -> None:
        nonlocal fields
        if text:
            fields = adapter.prompt.read_response(shown.text) if adapter else {}
            fields = page.tidy(fields) if page else fields
            emit("part", text=text, fields=fields)

    def show_thought(text: str) -> None:
        if text:
            emit("thought", text=text)

    async with stream:
        while (part := await stream.part()) is not None:
            show_thought(thought.add(part.thought))
            if part.text:
                show_thought(thought.rest())
                show(shown.add(part.text))
        show_thought(thought.rest())
        show(shown.rest())
        said: Answer = stream.answer
    return fields, {"finish_reason": said.finish_reason, "tokens": said.output_tokens, "forgotten": said.forgotten}


def _ask(client: AsyncClient, question: AnswerRequest, seed: int, base: bool) -> AsyncStream:
    sampling: dict[str, Any] = {"seed": seed}
    if question.temperature is not None:
        sampling["temperature"] = question.temperature
    if question.messages is not None or question.adapter is None:
        messages = [message.model_dump() for message in question.messages or []]
        return client.chat(
            messages, adapter=question.adapter, base=base, forget=True, thinking=question.thinking, **sampling
        )
    return client.ask(question.adapter, question.filled_in(), base=base, **sampling)


def _event(name: str, **data: Any) -> ServerSentEvent:
    return ServerSentEvent(event=name, data=data)
