"""OpenAI's HTTP API as far as one Gemma with adapters can keep it: what is asked, what is answered, what is refused.

A model's name is an adapter's, or `gemma` for the base alone. `/v1/chat/completions` writes the prompt that the adapter
was trained with (`Adapter.write_dialogue`): where a task has no turns, as slang's has none, the last message of the
user is its free field, or several as a JSON object such as {"context": "…", "condition": "…"}. `/v1/completions`
continues a text as it is. What is left out is sampled as the task is. Beside OpenAI's parameters those of vLLM are
taken: top_k, min_p, repetition_penalty, min_tokens, ignore_eos. What would change an answer and cannot be done is
refused by name; other keys are ignored, as clients send all kinds of them.
"""

import json
import math
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from serving.client import (
    BASE,
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
# What an answer would have to be another for, unless it has one of these values.
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
    """A request that gets an error in OpenAI's format."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: float = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @classmethod
    def of(cls, error: ServingError) -> "ApiError":
        """Of what the client of Triton says. Where the server lives and what ails it is nobody's business out there."""
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
        return cls(500, "the server failed at this request; its log says more", "internal")

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {"retry-after": str(math.ceil(self.retry_after))} if self.retry_after else {}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Completion(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    kind: ClassVar[str]  # the `object` of an answer
    prefix: ClassVar[str]  # of its id

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Any = None  # a text or several; the server says what is wrong with it
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None

    @classmethod
    def read(cls, body: bytes) -> Self:
        """
        Raises:
            ApiError: what is wrong with the first thing that is.
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
                raise ApiError(400, f"{name} is not supported here; leave it out", "unsupported_parameter", name)
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

    def send(self, client: AsyncClient) -> AsyncStream:
        raise NotImplementedError

    def choice(self, text: str, reason: str | None, place: Literal["whole", "first", "part"]) -> dict[str, Any]:
        """The text of an answer, or of a part of it, where OpenAI has it."""
        raise NotImplementedError


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _in_one_piece(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError('each part must be {"type": "text", "text": "…"}; this model reads nothing else')
        return "\n".join(part["text"] for part in value)

    def as_dict(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatCompletion(Completion):
    kind, prefix = "chat.completion", "chatcmpl-"

    messages: list[Message]
    max_completion_tokens: int | None = None

    @model_validator(mode="after")
    def _newest_name(self) -> Self:
        self.max_tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self

    def send(self, client: AsyncClient) -> AsyncStream:
        return client.chat([message.as_dict() for message in self.messages], self.adapter, **self.sampling)

    def choice(self, text: str, reason: str | None, place: Literal["whole", "first", "part"]) -> dict[str, Any]:
        said = {"role": "assistant", "content": text} if place != "part" else {"content": text} if text else {}
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

    def choice(self, text: str, reason: str | None, place: Literal["whole", "first", "part"]) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}


class Reply:
    """The answer to one request, whole or in chunks."""

    def __init__(self, form: Completion) -> None:
        self._form = form
        self.id = f"{form.prefix}{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, answer: Answer) -> dict[str, Any]:
        choice = self._form.choice(answer.text, answer.finish_reason, "whole")
        return self._object([choice]) | {"usage": _usage(answer)}

    def chunk(self, text: str, *, first: bool) -> str:
        return self._event([self._form.choice(text, None, "first" if first else "part")])

    def last(self, answer: Answer) -> str:
        """The end of a stream that went well: why it ended, what it cost if that was asked for, and `[DONE]`."""
        end = self._event([self._form.choice("", answer.finish_reason, "part")])
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
    """The base and the adapters as entries of `/v1/models`."""
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


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": answer.output_tokens,
        "total_tokens": answer.input_tokens + answer.output_tokens,
    }


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _named(message: str) -> str | None:
    """The parameter that an error begins with, or names as unknown."""
    found = re.match(r"(\w+)", message)
    return found[1] if found and found[1] in (*SAMPLING, "messages", "prompt") else None
