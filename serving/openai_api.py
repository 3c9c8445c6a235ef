"""OpenAI's HTTP API for one Gemma with adapters: requests, responses and errors.

The model is an adapter's name, or `gemma` for the base model alone. `/v1/chat/completions` uses the prompt that the
adapter was trained with (`Adapter.write_dialogue`); for a task without turns, such as slang, the last message fills the
prompt's main field, or several fields as a JSON object: {"context": "…", "condition": "…"}. `/v1/completions` continues
a text as it is. Parameters that are left out take the task's values. Beside OpenAI's parameters, these of vLLM are
accepted: top_k, min_p, repetition_penalty, min_tokens, ignore_eos. An unsupported parameter that would change the
answer is refused by name; other unknown keys are ignored, as clients send many of them.

A Gemma 4 thinks where it is told to as vLLM is, {"chat_template_kwargs": {"enable_thinking": true}}, into
`reasoning_content`, and may ask for `tools` to be called. For other models the former is ignored, the latter refused.
"""

import json
import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from serving.client import (
    BASE,
    Adapter,
    Answer,
    AnswerPart,
    AsyncClient,
    AsyncStream,
    Busy,
    DeadlineExceeded,
    InvalidRequest,
    ServingError,
    ToolCall,
    TooLong,
    Unavailable,
    UnknownAdapter,
)
from serving.protocol import STOP

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "min_tokens",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
)
# Unsupported parameters that would change the answer, each with the values that are harmless.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "echo": (False,),
    "modalities": (["text"],),
    "audio": (),
    "prompt_embeds": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "use_beam_search": (False,),
}


class ApiError(Exception):
    """A request that is answered by an error in OpenAI's format.

    Args:
        status: the HTTP status.
        code, param: as OpenAI has them.
        retry_after: seconds for the header of that name; 0: none.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: float = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @classmethod
    def of(cls, error: ServingError) -> "ApiError":
        """The error to answer with where the client of Triton raised `error`, without details of the server."""
        match error:
            case UnknownAdapter():
                return cls(404, str(error), "model_not_found", "model")
            case TooLong():
                return cls(400, str(error), "context_length_exceeded")
            case InvalidRequest():
                return cls(400, str(error), param=_named(str(error)))
            case Busy():
                return cls(429, "too many requests are waiting; try again shortly", "busy", retry_after=1)
            case Unavailable():
                return cls(503, "the model is being started; try again shortly", "unavailable", retry_after=2)
            case DeadlineExceeded():
                return cls(504, "the answer took too long; ask for fewer tokens, or try again later", "deadline")
        return cls(500, "the server failed at this request; its log has the details", "internal")

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Those of HTTP, and `x-should-retry: false`, which OpenAI's clients obey, where asking again cannot help: the
        request is wrong, was given all the time that there is for one, or has to wait for longer than they do."""
        headers = {"retry-after": str(math.ceil(self.retry_after))} if self.retry_after else {}
        if self.status not in (429, 500, 503) or self.retry_after > 60:
            headers["x-should-retry"] = "false"
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Completion(BaseModel):
    """What both kinds of request have in common.

    Attributes:
        kind: the `object` of its responses.
        prefix: of its responses' ids.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    kind: ClassVar[str]
    prefix: ClassVar[str]

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Any = None  # a string or a list of them; the server checks it
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Parse the body of a request.

        Raises:
            ApiError: it is not JSON, or a parameter is wrong; the message names the first one.
        """
        try:
            form = cls.model_validate_json(body)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, wrong["loc"]))
            text = wrong["msg"].removeprefix("Value error, ")
            if wrong["type"] == "json_invalid":
                raise ApiError(400, f"the body is not JSON in UTF-8: {text.removeprefix('Invalid JSON: ')}") from None
            raise ApiError(400, f"{where}: {text}" if where else text, param=where or None) from None
        for name, harmless in REFUSED.items():
            value = (form.model_extra or {}).get(name)
            if value is not None and value not in harmless:
                raise ApiError(400, f"{name} is not supported; leave it out", "unsupported_parameter", name)
        return form

    @property
    def adapter(self) -> str | None:
        return None if self.model == BASE.name else self.model

    @property
    def sampling(self) -> dict[str, Any]:
        return {name: value for name in SAMPLING if (value := getattr(self, name)) not in (None, [])}

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    async def settle(self, client: AsyncClient) -> None:
        """Settle what depends on the model that is asked.

        Raises:
            ApiError: it lacks something that the request cannot do without.
        """

    def send(self, client: AsyncClient) -> AsyncStream:
        """Send the request; the answer as it is generated."""
        raise NotImplementedError

    def choice(
        self,
        part: AnswerPart,
        reason: str | None,
        place: Literal["whole", "first", "part"],
        calls: Sequence[ToolCall] = (),
    ) -> dict[str, Any]:
        """An entry of `choices`: a whole answer, or the first or a later part of one."""
        raise NotImplementedError


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _may_only_call(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("tool_calls") and value.get("content") is None:
            return {**value, "content": ""}
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _in_one_piece(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError('each part must be {"type": "text", "text": "…"}; this model reads only text')
        return "\n".join(part["text"] for part in value)

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True) | {"role": "system" if self.role == "developer" else self.role}


class ChatCompletion(Completion):
    kind, prefix = "chat.completion", "chatcmpl-"

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: Any = None
    _thinking: bool = False

    @model_validator(mode="after")
    def _newest_name(self) -> Self:
        self.max_tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self

    @property
    def wanted_tools(self) -> list[dict[str, Any]]:
        return [] if (self.model_extra or {}).get("tool_choice") == "none" else self.tools or []

    async def settle(self, client: AsyncClient) -> None:
        options = self.chat_template_kwargs
        thinks = isinstance(options, dict) and bool(options.get("enable_thinking"))
        calls = bool(self.wanted_tools) or any(message.role == "tool" for message in self.messages)
        if thinks or calls:
            prompt = (await client.adapter(self.adapter or BASE.name)).prompt
            if calls and not prompt.has_gemma4_turns:
                raise ApiError(400, "tools is not supported; leave it out", "unsupported_parameter", "tools")
            self._thinking = thinks and prompt.has_gemma4_turns

    def send(self, client: AsyncClient) -> AsyncStream:
        messages = [message.as_dict() for message in self.messages]
        return client.chat(messages, self.adapter, thinking=self._thinking, tools=self.wanted_tools, **self.sampling)

    def choice(
        self,
        part: AnswerPart,
        reason: str | None,
        place: Literal["whole", "first", "part"],
        calls: Sequence[ToolCall] = (),
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant"} if place != "part" else {}
        if part.text or (place != "part" and not calls):
            said["content"] = part.text
        elif place == "whole":
            said["content"] = None
        if part.thought:
            said["reasoning_content"] = part.thought
        if calls:
            said["tool_calls"] = [_call(*call, None if place == "whole" else n) for n, call in enumerate(calls)]
        return {"index": 0, "message" if place == "whole" else "delta": said, "logprobs": None, "finish_reason": reason}


class TextCompletion(Completion):
    kind, prefix = "text_completion", "cmpl-"

    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        found = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(found, str):
            raise ValueError("one text a request, and no numbers of tokens")
        return found

    def send(self, client: AsyncClient) -> AsyncStream:
        return client.stream(self.prompt, self.adapter, **self.sampling)

    def choice(
        self,
        part: AnswerPart,
        reason: str | None,
        place: Literal["whole", "first", "part"],
        calls: Sequence[ToolCall] = (),
    ) -> dict[str, Any]:
        return {"index": 0, "text": part.text, "logprobs": None, "finish_reason": reason}


class Reply:
    """The response to one request, as a whole or in chunks."""

    def __init__(self, form: Completion) -> None:
        self._form = form
        self.id = f"{form.prefix}{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, answer: Answer) -> dict[str, Any]:
        text = answer.text.strip() if answer.tool_calls else answer.text
        part = AnswerPart(text, answer.thought)
        choice = self._form.choice(part, _reason(answer), "whole", answer.tool_calls)
        return self._object([choice]) | {"usage": _usage(answer)}

    def chunk(self, part: AnswerPart, *, first: bool) -> str:
        return self._event([self._form.choice(part, None, "first" if first else "part")])

    def last(self, answer: Answer) -> str:
        """The end of a complete stream: calls of tools, the finish reason, the usage if it was requested, and
        `[DONE]`."""
        nothing = AnswerPart("", "")
        end = self._event([self._form.choice(nothing, _reason(answer), "part")])
        if answer.tool_calls:
            end = self._event([self._form.choice(nothing, None, "part", answer.tool_calls)]) + end
        usage = _data(self._object([], ".chunk") | {"usage": _usage(answer)}) if self._form.wants_usage else ""
        return f"{end}{usage}data: [DONE]\n\n"

    def failure(self, error: ApiError) -> str:
        return _data(error.body())

    def _event(self, choices: list[dict[str, Any]]) -> str:
        return _data(self._object(choices, ".chunk") | ({"usage": None} if self._form.wants_usage else {}))

    def _object(self, choices: list[dict[str, Any]], suffix: str = "") -> dict[str, Any]:
        kind = self._form.kind + (suffix if self._form.kind == ChatCompletion.kind else "")
        return {"id": self.id, "object": kind, "created": self._created, "model": self._form.model, "choices": choices}


def models(adapters: list[Adapter], created: int) -> list[dict[str, Any]]:
    """The base model and the adapters as entries of `/v1/models`."""
    base = {"id": BASE.name, "object": "model", "created": created, "owned_by": "google"}
    if adapters:
        base["root"] = adapters[0].base
    return [base] + [
        {
            "id": adapter.name,
            "object": "model",
            "created": created,
            "owned_by": "you",
            "root": adapter.title,
            "parent": BASE.name,
        }
        for adapter in adapters
    ]


def _reason(answer: Answer) -> str:
    return "tool_calls" if answer.tool_calls and answer.finish_reason == STOP else answer.finish_reason


def _call(name: str, arguments: dict[str, Any], index: int | None) -> dict[str, Any]:
    """A call of a tool in OpenAI's form; `index` says which it is in a stream."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
    return call if index is None else {"index": index, **call}


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": answer.output_tokens,
        "total_tokens": answer.input_tokens + answer.output_tokens,
    }


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _named(message: str) -> str | None:
    """The parameter that an error message begins with; None where it begins with none."""
    found = re.match(r"(\w+)", message)
    return found[1] if found and found[1] in (*SAMPLING, "messages", "prompt", "tools") else None
