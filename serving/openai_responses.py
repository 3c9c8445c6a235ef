"""OpenAI's `/v1/responses` for text: how its requests become chat completions, and its responses and events.

The model is chosen and asked as in `/v1/chat/completions` (openai_api.py). `input` is a text or a list of messages,
`instructions` is a system message, and `text.format` says what the answer must be. Sampling parameters of vLLM are
taken under their own names. Responses are not kept, so what needs earlier ones is refused by name; a client that sends
the whole dialogue, its `input` and each `response.output` after it, needs none of that. There are no tools.

A Gemma 4 thinks where it is told to, {"chat_template_kwargs": {"enable_thinking": true}}, into an item "reasoning".
"""

import json
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving.client import Answer, AnswerPart, AsyncClient
from serving.openai_api import ChatCompletion, ChatMessage, Reply
from serving.openai_errors import ApiError
from serving.openai_parameters import IGNORED, REFUSED, SAMPLING, is_harmless, unknown
from serving.protocol import LENGTH

IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"  # states of a response
OWN = ("model", "input", "instructions", "max_output_tokens", "text", "metadata", "stream", "chat_template_kwargs")
# What is refused here beside `REFUSED`, each with the values that are harmless.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "include": ([],),
    "reasoning": ({}, {"effort": "none"}),
    "truncation": ("disabled",),
    "stream_options": ({}, {"include_obfuscation": False}),
    "context_management": ([],),
    "moderation": (),
    "logprobs": (False,),
    "n": (1,),
}
KEPT = ("previous_response_id", "conversation")  # they need responses that a server keeps
HARMLESS = IGNORED | {"max_tool_calls", "prompt_cache_options"}
TAKEN = frozenset({*OWN, *SAMPLING}) - {"max_tokens", *UNSUPPORTED}
NAMES = frozenset({*TAKEN, *UNSUPPORTED, *HARMLESS})
# Names of the other endpoints for what has another one here.
ELSEWHERE = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}


class InputItem(BaseModel):
    """A message of the dialogue; or an answer's thought, as it was sent, which is left out of the prompt."""

    type: Literal["message", "reasoning"]
    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kind = value.get("type") or "message"
        if kind == "reasoning":
            return {"type": kind, "role": "assistant", "content": ""}
        if kind != "message":
            raise ValueError(f"items of the type {str(kind)[:60]!r} are not supported, only messages")
        return {**value, "type": kind}

    @field_validator("content", mode="before")
    @classmethod
    def _in_one_piece(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("input_text", "output_text") or not isinstance(part.get("text"), str):
                found = f"; {str(kind)[:60]!r} is not supported" if kind else ""
                raise ValueError('each part must be {"type": "input_text" or "output_text", "text": "…"}' + found)
        return "\n".join(part["text"] for part in value)


class TextFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('the type "json_schema", and no other, has a "schema"')
        return self

    @property
    def structure(self) -> dict[str, Any] | None:
        """What an answer must be, as the sampling parameter `structured_outputs`."""
        if self.type == "json_schema":
            return {"json": self.json_schema}
        return {"json_object": True} if self.type == "json_object" else None


class TextOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ModelResponse(ChatCompletion):
    """A request to `/v1/responses`. What it has in common with a chat completion is in the fields of one."""

    kind, prefix, said_in = "response", "resp_", "input"

    input: list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    messages: list[ChatMessage] = Field(default=[], exclude=True)  # made of `instructions` and `input`

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, value: Any) -> Any:
        """The parameters that are taken.

        Raises:
            ApiError: another one would change the answer, or is unknown.
        """
        if not isinstance(value, dict):
            return value
        for name, one in value.items():
            if one is None or name in TAKEN or name in HARMLESS or _given(one) in UNSUPPORTED.get(name, ()):
                continue
            if name in UNSUPPORTED or (name in REFUSED and not is_harmless(name, one)):
                why = ", since responses are not kept: send the whole dialogue as input" if name in KEPT else ""
                message = f"{name} is not supported{why or '; leave it out'}"
                raise ApiError(400, message, "unsupported_parameter", name)
            if name not in REFUSED:
                meant = ELSEWHERE.get(name)
                message = f"unknown parameter {name!r}; did you mean {meant}?" if meant else unknown(name, NAMES)
                raise ApiError(400, message, "unknown_parameter", name[:60])
        return {name: one for name, one in value.items() if name in TAKEN}

    @field_validator("input", mode="before")
    @classmethod
    def _one_message(cls, value: Any) -> Any:
        return [{"role": "user", "content": value}] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _as_chat(self) -> Self:
        self.max_tokens = self.max_output_tokens
        said = [(item.role, item.content) for item in self.input if item.type == "message"]
        if self.instructions:
            # A dialogue has one system message.
            is_second = bool(said) and said[0][0] in ("system", "developer")
            text = f"{self.instructions}\n\n{said.pop(0)[1]}" if is_second else self.instructions
            said.insert(0, ("system", text))
        self.messages = [ChatMessage(role=role, content=text) for role, text in said]
        if wanted := self.format.structure:
            if self.structured_outputs is not None:
                raise ApiError(400, "text.format: give it or structured_outputs, not both", param="text.format")
            self.structured_outputs = wanted
        return self

    @property
    def format(self) -> TextFormat:
        return self.text.format if self.text and self.text.format else TextFormat(type="text")

    async def settle(self, client: AsyncClient) -> None:
        try:
            await super().settle(client)
        except ApiError as error:
            raise self.named_as_sent(error) from None

    def named_as_sent(self, error: ApiError) -> ApiError:
        error.param = self.said_in if error.param == "prompt" else error.param
        message = re.sub(r"^messages\b", "input", error.message).replace("response_format", "text.format")
        message = re.sub(r"\bmax_tokens\b", "max_output_tokens", message)
        if self.format.structure and "text.format" not in message:
            message = message.replace("structured_outputs.json_object", "text.format")
            message = message.replace("structured_outputs.json", "text.format.schema")
            message = message.replace("structured_outputs", "text.format")
        if message != error.message:
            begins = re.match(r"input|max_output_tokens|text\.format(\.schema)?", message)
            error.message, error.param = message, begins[0] if begins else error.param
        return error

    def reply(self) -> Reply:
        return ResponseReply(self)


class ResponseReply(Reply):
    """The response to one request, as a whole or as the events in which it comes into being."""

    form: ModelResponse

    def __init__(self, form: ModelResponse) -> None:
        super().__init__(form)
        self._output: list[dict[str, Any]] = []  # items; of a stream, the last one is not complete
        self._sent = 0  # events

    def whole(self, answer: Answer) -> dict[str, Any]:
        """What a stream of two pieces would end with."""
        for part in (AnswerPart("", answer.thought), AnswerPart(answer.text, "")):
            self.chunk(part, answer)
        self.last(answer)
        return self._response(_status(answer), answer)

    def chunk(self, part: AnswerPart, answer: Answer) -> str:
        said = ""
        if not self._sent:
            said = "".join(self._sse(f"response.{one}", response=self._response()) for one in ("created", IN_PROGRESS))
        if part.thought:
            said += self._add("reasoning", part.thought)
        if part.text:
            said += self._add("message", part.text)
        return said

    def last(self, answer: Answer) -> str:
        """The end of a complete stream: of its last item, which is a message, and of the response."""
        status, end = _status(answer), ""
        if not self._output or self._output[-1]["type"] != "message":
            end = self._close(status) + self._open("message")
        return end + self._close(status) + self._sse(f"response.{status}", response=self._response(status, answer))

    def failure(self, error: ApiError) -> str:
        """The response as failed; and an error in the two forms that OpenAI has for one, since its clients raise only
        for the one that is not in its reference."""
        if self._output:
            self._output[-1]["status"] = "incomplete"
        code = {400: "invalid_prompt", 429: "rate_limit_exceeded"}.get(error.status, "server_error")
        failed = self._response("failed") | {"error": {"code": code, "message": error.message}}
        body = error.body()["error"]
        flat = {name: body[name] for name in ("code", "message", "param")}
        return self._sse("response.failed", response=failed) + self._sse("error", **flat, error=body)

    def _add(self, kind: Literal["message", "reasoning"], text: str) -> str:
        """The events of more text, in a new item if the last one is of another kind."""
        said = ""
        if not self._output or self._output[-1]["type"] != kind:
            said = self._close("completed") + self._open(kind)
        part = self._output[-1]["content"][0]
        part["text"] += text
        return said + self._of_part(f"response.{part['type']}.delta", delta=text)

    def _open(self, kind: Literal["message", "reasoning"]) -> str:
        item: dict[str, Any]
        if kind == "message":
            item = {"id": f"msg_{uuid.uuid4().hex}", "type": kind, "role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": f"rs_{uuid.uuid4().hex}", "type": kind, "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        self._output.append({**item, "status": IN_PROGRESS, "content": []})
        said = self._of_item("response.output_item.added")
        self._output[-1]["content"].append(part)
        return said + self._of_part("response.content_part.added", part=part)

    def _close(self, status: str) -> str:
        """The events of the end of the last item, if there is one."""
        if not self._output:
            return ""
        self._output[-1]["status"] = status
        part = self._output[-1]["content"][0]
        return (
            self._of_part(f"response.{part['type']}.done", text=part["text"])
            + self._of_part("response.content_part.done", part=part)
            + self._of_item("response.output_item.done")
        )

    def _of_item(self, name: str) -> str:
        return self._sse(name, output_index=len(self._output) - 1, item=self._output[-1])

    def _of_part(self, name: str, **fields: Any) -> str:
        if name.startswith("response.output_text."):
            fields["logprobs"] = []
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}
        return self._sse(name, **place, **fields)

    def _sse(self, name: str, **fields: Any) -> str:
        event = {"type": name, "sequence_number": self._sent, **fields}
        self._sent += 1
        return f"event: {name}\ndata: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def _response(self, status: str = IN_PROGRESS, answer: Answer | None = None) -> dict[str, Any]:
        """The object, of a whole `answer` or of what there is of it."""
        form = self.form
        return {
            "id": self.id,
            "object": form.kind,
            "created_at": self._created,
            "completed_at": int(time.time()) if status == COMPLETED else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == INCOMPLETE else None,
            "instructions": form.instructions,
            "max_output_tokens": form.max_output_tokens,
            "metadata": form.metadata or {},
            "model": form.model,
            "output": self._output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": form.temperature,
            "text": {"format": form.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": form.top_p,
            "truncation": "disabled",
            "usage": answer and _usage(answer),
        }


def _given(value: Any) -> Any:
    """`value` without the names of an object that have no value."""
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def _status(answer: Answer) -> str:
    return INCOMPLETE if answer.finish_reason == LENGTH else COMPLETED


def _usage(answer: Answer) -> dict[str, Any]:
    """Of tokens; which of them were cached or thought is not known."""
    return {
        "input_tokens": answer.input_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.input_tokens + answer.output_tokens,
    }
