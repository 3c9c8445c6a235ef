"""The protocol between Triton's stub and the engine: one JSON object a line, in UTF-8, over a Unix socket.

A copy of this file lies beside the stub's model.py, so it needs only the standard library. To the engine:

    {"op": "generate", "id": 7, "prompt": "…", "sampling": {…}, "lora_name": "slang" or null, "stream": true}
    {"op": "cancel", "id": 7}
    {"op": "stats"}

From the engine; an id belongs to its connection, and closing a connection cancels its requests:

    {"id": 7, "text": "new text", "tokens": 3}                                   only with stream
    {"id": 7, "done": true, "text": "…", "finish_reason": "stop", "input_tokens": 80, "output_tokens": 12,
     "ttft": 0.11, "queued": 0.0}                                                text: with stream, only its last piece
    {"id": 7, "error": "one sentence", "code": "busy"}
    {"heartbeat": {"running": 3, "waiting": 0, "kv_tokens": 412, "adapters": ["slang"], "tokens": {"slang": 96}, …}}
    {"stats": {…}}                                                               what a heartbeat holds, and more

A prompt may also be a list of tokens. With the sampling parameter `logprobs`, the messages with text have a field of
that name: for each token since the last one, {"the token": {"logprob": -0.1, "rank": 1, "decoded_token": " the"}, …},
first the one that was chosen.

The generating loop sends a heartbeat to every connection four times a second, between steps: an engine that hangs sends
none.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from serving.sampling_parameters import RequestError, Sampling, read_sampling

HEARTBEAT_SECONDS = 0.25
MAX_LINE = 8 << 20  # bytes: a prompt of 1 MB, escaped

# Error codes: the first word of an error's text as Triton's clients see it.
INVALID = "invalid"
BUSY = "busy"
UNKNOWN_ADAPTER = "unknown_adapter"
UNAVAILABLE = "unavailable"
INTERNAL = "internal"
CODES = (INVALID, BUSY, UNKNOWN_ADAPTER, UNAVAILABLE, INTERNAL)

# Finish reasons.
STOP = "stop"  # an end token, or a stop string
LENGTH = "length"  # max_tokens, or the model's window
CANCELLED = "cancelled"

Prompt = str | tuple[int, ...]  # its text, or its tokens
Logprobs = list[dict[int, dict[str, Any]]]  # for each token: token → its logprob, rank and decoded_token


@dataclass(frozen=True, slots=True)
class Generate:
    """One request."""

    id: int
    prompt: Prompt
    sampling: Sampling
    lora_name: str | None = None
    stream: bool = False

    def as_json(self) -> dict[str, Any]:
        return {"op": "generate", **asdict(self)}


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of a streamed answer, sent once it can no longer change; `tokens`: those generated so far."""

    id: int
    text: str
    tokens: int
    logprobs: Logprobs | None = None

    def as_json(self) -> dict[str, Any]:
        return _without_none({"id": self.id, "text": self.text, "tokens": self.tokens, "logprobs": self.logprobs})


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer.

    Attributes:
        text: the whole answer; of a stream, what no `Delta` has carried yet.
        ttft: seconds from the request's arrival to its first token.
        queued: seconds from the request's arrival to its first step.
    """

    id: int
    text: str
    finish_reason: str
    input_tokens: int
    output_tokens: int
    ttft: float
    queued: float
    logprobs: Logprobs | None = None

    def as_json(self) -> dict[str, Any]:
        return {"done": True, **_without_none(asdict(self))}


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that failed or was refused; `id` is None where the line could not be read."""

    id: int | None
    error: str
    code: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as one line. Lone surrogates, which UTF-8 cannot encode, are escaped."""
    try:
        return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The message of one line.

    Raises:
        RequestError: the line is not a JSON object in UTF-8.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is not JSON in UTF-8: {error}") from None
    if not isinstance(message, dict):
        raise RequestError("the line is not a JSON object")
    return message


def _without_none(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def read_answer(message: Mapping[str, Any]) -> Delta | Done | Failed:
    """The engine's message about one request, as its class; not for heartbeats and statistics, which have no `id`."""
    kind = Failed if "error" in message else Done if message.get("done") else Delta
    return kind(**{field.name: message[field.name] for field in fields(kind) if field.name in message})


def read_generate(message: Mapping[str, Any]) -> Generate:
    """The request in a message to the engine.

    Raises:
        RequestError: a field is wrong; the message names the first one.
    """
    number, prompt, stream = message.get("id"), message.get("prompt"), message.get("stream", False)
    if not isinstance(number, int) or isinstance(number, bool):
        raise RequestError("id is not a whole number")
    if isinstance(prompt, list):
        prompt = tuple(prompt)
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in prompt):
            raise RequestError("prompt is a list, but not of tokens: whole numbers from 0")
    elif not isinstance(prompt, str):
        raise RequestError("prompt is neither a text nor a list of tokens")
    if not isinstance(stream, bool):
        raise RequestError("stream is neither true nor false")
    given = message.get("sampling") or {}
    if not isinstance(given, dict):
        raise RequestError("sampling is not an object")
    sampling, lora_name = read_sampling({**given, "lora_name": message.get("lora_name")})
    return Generate(number, check_prompt(prompt), sampling, lora_name, stream)


def check_prompt(prompt: Prompt) -> Prompt:
    """`prompt` itself.

    Raises:
        RequestError: the prompt is empty, or contains a lone surrogate.
    """
    if not prompt:
        raise RequestError("the prompt is empty")
    try:
        if isinstance(prompt, str):
            prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not Unicode: half a character at {error.start}") from None
    return prompt
