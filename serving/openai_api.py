"""OpenAI's HTTP API for one Gemma with adapters: requests, responses and errors.

The model is an adapter's name, or `gemma` for the base model alone. `/v1/chat/completions` uses the prompt that the
adapter was trained with (`Adapter.write_dialogue`); for a task without turns, such as slang, the last message fills the
prompt's main field, or several fields as a JSON object: {"context": "…", "condition": "…"}. `/v1/completions` continues
a text as it is. Parameters that are left out take the task's values. docs/parameters.md says which parameters of OpenAI
and of vLLM have an effect, which have none here, and which are refused by name; unknown names are refused too.

A Gemma 4 thinks where it is told to as vLLM is, {"chat_template_kwargs": {"enable_thinking": true}}, into
`reasoning_content`, and may ask for `tools` to be called. For other models the former is ignored, the latter refused.
"""

import json
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serving import openai_logprobs
from serving.choices import Answers, ChoicePart, Choices
from serving.client import (
    BASE,
    Adapter,
    Answer,
    AnswerPart,
    AsyncClient,
    AsyncStream,
    ToolCall,
)
from serving.openai_errors import ApiError, named_parameter
from serving.openai_parameters import (
    IGNORED,
    NOTHING,
    REFUSED,
    SAMPLING,
    as_sent,
    is_harmless,
    structured_outputs,
    unknown,
)
from serving.protocol import STOP
from serving.sampling_parameters import MAX_LOGPROBS

MAX_CHOICES = 16  # answers to one request
SEEDS = 1 << 63


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Completion(BaseModel):
    """What both kinds of request have in common.

    Attributes:
        kind: the `object` of its responses.
        prefix: of its responses' ids.
        said_in: the parameter that becomes the prompt.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    kind: ClassVar[str]
    prefix: ClassVar[str]
    said_in: ClassVar[str]

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
    # The server checks these.
    skip_special_tokens: Any = None
    stop_token_ids: Any = None
    include_stop_str_in_output: Any = None
    logit_bias: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    structured_outputs: Any = None
    truncate_prompt_tokens: Any = None
    response_format: Any = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @model_validator(mode="after")
    def _one_structure(self) -> Self:
        self.structured_outputs = structured_outputs(self.response_format, self.structured_outputs)
        return self

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
            raise ApiError(400, f"{where}: {text}" if where else text, param=where or named_parameter(text)) from None
        for name, value in (form.model_extra or {}).items():
            if value is None or name in IGNORED or is_harmless(name, value):
                continue
            if name in REFUSED:
                raise ApiError(400, f"{name} is not supported; leave it out", "unsupported_parameter", name)
            raise ApiError(400, unknown(name, cls.model_fields), "unknown_parameter", name[:60])
        return form

    @property
    def adapter(self) -> str | None:
        return None if self.model == BASE.name else self.model

    @property
    def sampling(self) -> dict[str, Any]:
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        return {name: value for name, value in given.items() if value != NOTHING.get(name)}

    def named_as_sent(self, error: ApiError) -> ApiError:
        """`error`, with this request's names of what became the parameters that the server speaks of."""
        error.message = as_sent(error.message, self.model_dump(include={"response_format", "max_completion_tokens"}))
        error.param = named_parameter(error.message) if error.param in SAMPLING else error.param
        error.param = self.said_in if error.param == "prompt" else error.param
        return error

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    async def settle(self, client: AsyncClient) -> None:
        """Settle what depends on the model that is asked.

        Raises:
            ApiError: it lacks something that the request cannot do without.
        """

    def send(self, client: AsyncClient) -> AsyncStream:
        """Send the request; the answers as they are generated."""
        streams = [
            stream for one in self.prompts() for stream in (self.ask(client, one, given) for given in self.samplings())
        ]
        return Choices(streams, self.n or 1) if len(streams) > 1 else streams[0]

    @property
    def answers(self) -> int:
        """How many it asks for."""
        return len(self.prompts()) * (self.n or 1)

    def samplings(self) -> list[dict[str, Any]]:
        """The sampling parameters of the answers to one prompt, each with a seed of its own where one was given."""
        samplings = [self.sampling for _ in range(self.n or 1)]
        if self.seed is not None and 0 <= self.seed < SEEDS:  # others are none, or refused
            for number, sampling in enumerate(samplings):
                sampling["seed"] = (self.seed + number) % SEEDS
        return samplings

    def prompts(self) -> list[Any]:
        """What is to be answered, each `n` times."""
        raise NotImplementedError

    def ask(self, client: AsyncClient, prompt: Any, sampling: Mapping[str, Any]) -> AsyncStream:
        """Ask for one answer."""
        raise NotImplementedError

    def reply(self) -> "Reply":
        """What the response to it is written by."""
        return Reply(self)

    def choice(
        self,
        index: int,
        part: AnswerPart,
        reason: str | None,
        place: Literal["whole", "first", "part"],
        calls: Sequence[ToolCall] = (),
    ) -> dict[str, Any]:
        """The entry `index` of `choices`: a whole answer, or the first or a later part of one."""
        raise NotImplementedError

    def logprobs_of(self, index: int, answer: Answer, first: int, last: int) -> dict[str, Any] | None:
        """`logprobs` of that entry, of the answer's tokens from `first` to before `last`; None: not asked for."""
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
    kind, prefix, said_in = "chat.completion", "chatcmpl-", "messages"

    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: Any = None
    continue_final_message: bool | None = None
    _thinking: bool = False

    @model_validator(mode="before")
    @classmethod
    def _no_new_turn(cls, value: Any) -> Any:
        """vLLM wants `add_generation_prompt` to be false where the last message goes on; otherwise it is refused."""
        if isinstance(value, dict) and value.get("continue_final_message") is True:
            return {name: one for name, one in value.items() if (name, one) != ("add_generation_prompt", False)}
        return value

    @model_validator(mode="after")
    def _newest_name(self) -> Self:
        self.max_tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self

    @model_validator(mode="after")
    def _logprobs_are_wanted(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError('top_logprobs: it needs "logprobs": true')
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        given = {name: value for name, value in super().sampling.items() if name != "logprobs"}
        return given | ({"logprobs": self.top_logprobs or 0} if self.logprobs else {})

    @property
    def wanted_tools(self) -> list[dict[str, Any]]:
        return [] if (self.model_extra or {}).get("tool_choice") == "none" else self.tools or []

    async def settle(self, client: AsyncClient) -> None:
        if self.continue_final_message and (
            not self.messages or self.messages[-1].role != "assistant" or self.messages[-1].tool_calls
        ):
            message = "continue_final_message: the last message must be a text of the assistant, to go on with"
            raise ApiError(400, message, param="continue_final_message")
        options = self.chat_template_kwargs
        thinks = isinstance(options, dict) and bool(options.get("enable_thinking"))
        calls = bool(self.wanted_tools) or any(message.role == "tool" for message in self.messages)
        if thinks or calls:
            prompt = (await client.adapter(self.adapter or BASE.name)).prompt
            if calls and not prompt.has_gemma4_turns:
                raise ApiError(400, "tools is not supported; leave it out", "unsupported_parameter", "tools")
            self._thinking = thinks and prompt.has_gemma4_turns
        if self.structured_outputs and (self._thinking or self.wanted_tools):
            other = "thinking" if self._thinking else "tools"
            message = f"response_format and structured_outputs cannot be combined with {other}: the whole answer is one"
            raise ApiError(400, message, "unsupported_parameter", "response_format")

    def prompts(self) -> list[Any]:
        messages = [message.as_dict() for message in self.messages]
        if self.continue_final_message:
            messages[-1]["prefix"] = True
        return [messages]

    def ask(self, client: AsyncClient, prompt: Any, sampling: Mapping[str, Any]) -> AsyncStream:
        return client.chat(prompt, self.adapter, thinking=self._thinking, tools=self.wanted_tools, **sampling)

    def choice(
        self,
        index: int,
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
        where = "message" if place == "whole" else "delta"
        return {"index": index, where: said, "logprobs": None, "finish_reason": reason}

    def logprobs_of(self, index: int, answer: Answer, first: int, last: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return openai_logprobs.of_chat(answer.logprobs[first:last], self.top_logprobs or 0)


class TextCompletion(Completion):
    kind, prefix, said_in = "text_completion", "cmpl-", "prompt"

    prompt: list[str | list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        found = [value] if isinstance(value, str) or _are_tokens(value) else value
        if (
            not isinstance(found, list)
            or not found
            or not all(isinstance(one, str) or _are_tokens(one) for one in found)
        ):
            raise ValueError("a text or a list of tokens, or a list of these")
        return found

    @model_validator(mode="after")
    def _echo_of_text(self) -> Self:
        if self.echo and not all(isinstance(one, str) for one in self.prompt):
            raise ValueError("echo: only a prompt that is a text can be repeated, not its tokens")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: not together with logprobs, since those of the prompt are not computed")
        return self

    @model_validator(mode="after")
    def _few(self) -> Self:
        if self.answers > MAX_CHOICES:
            raise ValueError(f"prompt: {self.answers} answers are asked for; a request has at most {MAX_CHOICES}")
        return self

    def prompts(self) -> list[Any]:
        return list(self.prompt)

    def ask(self, client: AsyncClient, prompt: Any, sampling: Mapping[str, Any]) -> AsyncStream:
        return client.stream(prompt, self.adapter, **sampling)

    def choice(
        self,
        index: int,
        part: AnswerPart,
        reason: str | None,
        place: Literal["whole", "first", "part"],
        calls: Sequence[ToolCall] = (),
    ) -> dict[str, Any]:
        before = str(self.prompt[index // (self.n or 1)]) if self.echo and place != "part" else ""
        return {"index": index, "text": before + part.text, "logprobs": None, "finish_reason": reason}

    def logprobs_of(self, index: int, answer: Answer, first: int, last: int) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        offset = sum(openai_logprobs.characters(chosen) for chosen, *_ in answer.logprobs[:first])
        return openai_logprobs.of_text(answer.logprobs[first:last], self.logprobs, offset)


class Reply:
    """The response to one request, as a whole or in chunks."""

    def __init__(self, form: Completion) -> None:
        self.form = form
        self.id = f"{form.prefix}{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._begun: set[int] = set()  # answers of which a part was sent
        self._told: Counter[int] = Counter()  # tokens of each answer whose log-probabilities were sent

    def whole(self, answer: Answer) -> dict[str, Any]:
        choices = []
        for index, one in enumerate(_each(answer)):
            part = AnswerPart(one.text.strip() if one.tool_calls else one.text, one.thought)
            choice = self.form.choice(index, part, _reason(one), "whole", one.tool_calls)
            choices.append(choice | {"logprobs": self._logprobs(index, one, one.output_tokens)})
        return self._object(choices) | {"usage": _usage(answer)}

    def chunk(self, part: AnswerPart, answer: Answer) -> str:
        """A part of the stream whose answer so far is `answer`."""
        index = part.number if isinstance(part, ChoicePart) else 0
        place: Literal["first", "part"] = "part" if index in self._begun else "first"
        self._begun.add(index)
        logprobs = self._logprobs(index, _each(answer)[index], part.tokens)
        return self._event([self.form.choice(index, part, None, place) | {"logprobs": logprobs}])

    def last(self, answer: Answer) -> str:
        """The end of a complete stream: calls of tools, the finish reasons, the usage if it was requested, and
        `[DONE]`."""
        nothing, end = AnswerPart("", ""), ""
        for index, one in enumerate(_each(answer)):
            if index not in self._begun:
                end += self._event([self.form.choice(index, nothing, None, "first")])
            if one.tool_calls:
                end += self._event([self.form.choice(index, nothing, None, "part", one.tool_calls)])
            logprobs = self._logprobs(index, one, one.output_tokens)  # of tokens without a text, as of the answer's end
            end += self._event([self.form.choice(index, nothing, _reason(one), "part") | {"logprobs": logprobs}])
        usage = _data(self._object([], ".chunk") | {"usage": _usage(answer)}) if self.form.wants_usage else ""
        return f"{end}{usage}data: [DONE]\n\n"

    def failure(self, error: ApiError) -> str:
        return _data(error.body())

    def _logprobs(self, index: int, answer: Answer, tokens: int) -> dict[str, Any] | None:
        """Of the next `tokens` of the answer `index`."""
        first = self._told[index]
        last = self._told[index] = min(first + tokens, len(answer.logprobs))
        return self.form.logprobs_of(index, answer, first, last) if last > first else None

    def _event(self, choices: list[dict[str, Any]]) -> str:
        return _data(self._object(choices, ".chunk") | ({"usage": None} if self.form.wants_usage else {}))

    def _object(self, choices: list[dict[str, Any]], suffix: str = "") -> dict[str, Any]:
        kind = self.form.kind + (suffix if self.form.kind == ChatCompletion.kind else "")
        return {"id": self.id, "object": kind, "created": self._created, "model": self.form.model, "choices": choices}


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


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and 0 <= one < 1 << 31 for one in value)


def _each(answer: Answer) -> list[Answer]:
    return answer.each if isinstance(answer, Answers) else [answer]


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
