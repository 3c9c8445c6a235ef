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

The generating loop sends a heartbeat to every connection four times a second, between steps: an engine that hangs sends
none.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

HEARTBEAT_SECONDS = 0.25
MAX_LINE = 8 << 20  # bytes: a prompt of 1 MB, escaped
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1000

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


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        sentence: what is wrong with it.
        code: one of `CODES`.
    """

    def __init__(self, sentence: str, code: str = INVALID) -> None:
        super().__init__(sentence)
        self.sentence, self.code = sentence, code


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; names, meanings and defaults are vLLM's."""

    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None or -1: another one for each request
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    skip_special_tokens: bool = True  # leave control tokens out of the text; the one that ends it always is

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Generate:
    """One request."""

    id: int
    prompt: str
    sampling: Sampling = Sampling()
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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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

    def as_json(self) -> dict[str, Any]:
        return {"done": True, **asdict(self)}


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


def read_answer(message: Mapping[str, Any]) -> Delta | Done | Failed:
    """The engine's message about one request, as its class; not for heartbeats and statistics, which have no `id`."""
    kind = Failed if "error" in message else Done if message.get("done") else Delta
    return kind(**{field.name: message[field.name] for field in fields(kind)})


def read_generate(message: Mapping[str, Any]) -> Generate:
    """The request in a message to the engine.

    Raises:
        RequestError: a field is wrong; the message names the first one.
    """
    number, prompt, stream = message.get("id"), message.get("prompt"), message.get("stream", False)
    if not isinstance(number, int) or isinstance(number, bool):
        raise RequestError("id is not a whole number")
    if not isinstance(prompt, str):
        raise RequestError("prompt is not a text")
    if not isinstance(stream, bool):
        raise RequestError("stream is neither true nor false")
    given = message.get("sampling") or {}
    if not isinstance(given, dict):
        raise RequestError("sampling is not an object")
    sampling, lora_name = read_sampling({**given, "lora_name": message.get("lora_name")})
    return Generate(number, check_prompt(prompt), sampling, lora_name, stream)


def check_prompt(prompt: str) -> str:
    """`prompt` itself.

    Raises:
        RequestError: the prompt is empty, or contains a lone surrogate.
    """
    if not prompt:
        raise RequestError("the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not Unicode: half a character at {error.start}") from None
    return prompt


def read_sampling(given: str | bytes | Mapping[str, Any] | None) -> tuple[Sampling, str | None]:
    """Parse `sampling_parameters` as NVIDIA's vLLM backend takes them: a JSON object whose values may be strings.

    Returns:
        The parameters, and the adapter's name (`lora_name`; None: the base model).

    Raises:
        RequestError: a parameter is unknown or out of range; the message names it.
    """
    if given is None or isinstance(given, str | bytes):
        try:
            given = json.loads(given) if given else {}
        except (ValueError, RecursionError) as error:
            raise RequestError(f"sampling_parameters is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise RequestError('sampling_parameters is not a JSON object, such as {"temperature": 0}')
    values = {name: value for name, value in given.items() if value is not None}
    lora_name = values.pop("lora_name", None)
    if lora_name is not None and (not isinstance(lora_name, str) or not lora_name):
        raise RequestError(f"lora_name is not a name: {_shown(lora_name)}")
    if (n := _whole("n", values.pop("n", 1))) != 1:
        raise RequestError(f"n is {n}; only one answer a request is given: n=1")
    known = {field.name for field in fields(Sampling)}
    if unknown := [name for name in values if name not in known]:
        raise RequestError(
            f"unknown sampling parameter {_shown(unknown[0])}. Known: {', '.join(sorted([*known, 'lora_name', 'n']))}"
        )
    read: dict[str, Any] = {name: READERS[name](name, value) for name, value in values.items()}
    if 0 < read.get("temperature", 0) < 0.01:
        read["temperature"] = 0.01  # as vLLM: logits divided by less overflow
    if read.get("seed") == -1:
        read["seed"] = None
    sampling = Sampling(**read)
    if sampling.min_tokens > sampling.max_tokens:
        raise RequestError(f"min_tokens is {sampling.min_tokens}, more than max_tokens, {sampling.max_tokens}")
    return sampling, lora_name


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"{name} is not a number: {_shown(value)}")
    return number


def _whole(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(name, value)
    if not number.is_integer():
        raise RequestError(f"{name} is not a whole number: {_shown(value)}")
    try:
        return int(value)  # of a text, all digits count
    except ValueError:  # "1e3"
        return int(number)


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise RequestError(f"{name} is neither true nor false: {_shown(value)}")
    return value


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError(f"{name} is not a text, or a list of texts, that are not empty: {_shown(value)}")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise RequestError(f"{name} holds more than {MAX_STOPS} texts, or one of over {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


def _between(read: Any, low: float, high: float, allowed: str) -> Any:
    """A reader that accepts values from `low` to `high`, both included."""

    def reader(name: str, value: Any) -> Any:
        number = read(name, value)
        if not low <= number <= high:
            raise RequestError(f"{name} is {_shown(number)}; it is {allowed}")
        return number

    return reader


TINY = math.ulp(0.0)  # above 0
READERS = {
    "temperature": _between(_number, 0, 1e6, "0 (greedy) or more, at most 1,000,000"),
    "top_p": _between(_number, TINY, 1, "above 0 and at most 1"),
    "top_k": _between(_whole, -1, 2**31, "a whole number: 0 (off) or more"),
    "min_p": _between(_number, 0, 1, "from 0 to 1"),
    "max_tokens": _between(_whole, 1, 2**31, "1 or more"),
    "min_tokens": _between(_whole, 0, 2**31, "0 or more"),
    "stop": _stops,
    "seed": _between(_whole, -1, 2**63 - 1, "a whole number from 0, below 2^63"),
    "repetition_penalty": _between(_number, 0.01, 100, "from 0.01 to 100; 1 is none"),
    "presence_penalty": _between(_number, -2, 2, "from -2 to 2"),
    "frequency_penalty": _between(_number, -2, 2, "from -2 to 2"),
    "ignore_eos": _truth,
    "skip_special_tokens": _truth,
}


def _shown(value: Any) -> str:
    """A value, shortened for an error message."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of over 20 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
