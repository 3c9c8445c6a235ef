"""Sampling parameters: names, meanings and defaults are vLLM's. What they are, and how they are read and checked.

A copy of this file lies beside the stub's model.py, so it needs only the standard library.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1000
MAX_GRAMMAR_BYTES = 1 << 16  # of a schema, an expression, a grammar, or all choices
MAX_DEPTH = 100  # of a schema
MAX_TOKEN_IDS, MAX_BIASES = 10_000, 1024
MAX_LOGPROBS = 20  # vLLM's own limit


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        sentence: what is wrong with it.
        code: one of `protocol.CODES`.
    """

    def __init__(self, sentence: str, code: str = "invalid") -> None:
        super().__init__(sentence)
        self.sentence, self.code = sentence, code


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """What an answer must be; exactly one of these is given."""

    json: dict[str, Any] | None = None  # a JSON Schema
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None  # in Lark's notation or in GBNF


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

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
    skip_special_tokens: bool = True  # leave control tokens out of the text
    stop_token_ids: tuple[int, ...] = ()  # end an answer too
    include_stop_str_in_output: bool = False  # what ends an answer, a text or a token, stays at its end
    logit_bias: dict[int, float] | None = None  # token → what is added to its logit
    allowed_token_ids: tuple[int, ...] | None = None  # no others are chosen
    bad_words: tuple[str, ...] = ()  # never said
    structured_outputs: StructuredOutputs | None = None
    # What the model itself thought of each token, before any of the above: of the chosen one and of so many likeliest.
    logprobs: int | None = None
    truncate_prompt_tokens: int | None = (
        None  # keep so many tokens at the prompt's end; -1: as many as there is room for
    )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def highest_token(self) -> tuple[str, int]:
        """The parameter that names the highest number of a token, and that number; ("", -1): none does."""
        named = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": self.logit_bias or (),
            "allowed_token_ids": self.allowed_token_ids or (),
        }
        return max(
            ((name, max(tokens)) for name, tokens in named.items() if tokens), key=lambda one: one[1], default=("", -1)
        )


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
    if sampling.truncate_prompt_tokens == 0:
        raise RequestError("truncate_prompt_tokens is 0; a prompt has at least one token")
    if sampling.min_tokens > sampling.max_tokens:
        raise RequestError(f"min_tokens is {sampling.min_tokens}, more than max_tokens, {sampling.max_tokens}")
    for name in ("allowed_token_ids", "bad_words"):
        if sampling.structured_outputs and getattr(sampling, name):
            raise RequestError(f"{name} cannot be combined with structured_outputs, which may need what it forbids")
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


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_TOKEN_IDS:
        raise RequestError(f"{name} is not a list of at most {MAX_TOKEN_IDS:,} tokens: {_shown(value)}")
    return tuple(_token(name, one) for one in value)


def _bias(name: str, value: Any) -> dict[int, float] | None:
    given = _object(name, value)
    if len(given) > MAX_BIASES:
        raise RequestError(f"{name} has {len(given):,} tokens, more than {MAX_BIASES:,}")
    bias = _between(_number, -100, 100, "from -100 to 100")
    return {_token(name, token): bias(f"{name}.{_shown(token)[1:-1]}", one) for token, one in given.items()} or None


def _structure(name: str, value: Any) -> StructuredOutputs:
    """`structured_outputs`: an object or, as NVIDIA's vLLM backend takes it, JSON in a text."""
    given = _object(name, value)
    given = {key: one for key, one in given.items() if one is not None and one is not False}
    known = [field.name for field in fields(StructuredOutputs)]
    if unknown := [key for key in given if key not in known]:
        raise RequestError(f"{name}.{_shown(unknown[0])[1:-1]} is not supported. Known: {', '.join(known)}")
    if len(given) != 1:
        raise RequestError(f"{name} has {', '.join(given) or 'nothing'}; give one of {', '.join(known)}")
    ((kind, wanted),) = given.items()
    where = f"{name}.{kind}"
    if kind == "json":
        wanted = _object(where, wanted)
        if _is_deeper(wanted, MAX_DEPTH):
            raise RequestError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    elif kind == "choice":
        if not isinstance(wanted, list | tuple) or not wanted or not all(isinstance(c, str) and c for c in wanted):
            raise RequestError(f"{where} is not a list of texts that are not empty: {_shown(wanted)}")
        wanted = tuple(wanted)
    elif kind == "json_object":
        wanted = _truth(where, wanted)
    elif not isinstance(wanted, str) or not wanted:
        raise RequestError(f"{where} is not a text, or is empty: {_shown(wanted)}")
    try:
        size = len(json.dumps(wanted, ensure_ascii=False, allow_nan=False).encode())
    except ValueError as error:  # a number that JSON has not, half a character
        raise RequestError(f"{where} cannot be written as JSON: {error}") from None
    if size > MAX_GRAMMAR_BYTES:
        raise RequestError(f"{where} has {size:,} bytes, more than {MAX_GRAMMAR_BYTES:,}")
    return StructuredOutputs(**{kind: wanted})


def _is_deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth == 0 or any(_is_deeper(one, depth - 1) for one in inner)


def _object(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{name} is not an object: {_shown(value)}")
    return value


def _between(read: Any, low: float, high: float, allowed: str) -> Any:
    """A reader that accepts values from `low` to `high`, both included."""

    def reader(name: str, value: Any) -> Any:
        number = read(name, value)
        if not low <= number <= high:
            raise RequestError(f"{name} is {_shown(number)}; it is {allowed}")
        return number

    return reader


_token = _between(_whole, 0, 2**31, "the number of a token, 0 or more")
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
    "stop_token_ids": _token_ids,
    "include_stop_str_in_output": _truth,
    "logit_bias": _bias,
    "allowed_token_ids": lambda name, value: _token_ids(name, value) or None,
    "bad_words": _stops,
    "structured_outputs": _structure,
    "logprobs": _between(_whole, 0, MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
    "truncate_prompt_tokens": _between(_whole, -1, 2**31, "a whole number: -1 (as many as there is room for) or more"),
}


def _shown(value: Any) -> str:
    """A value, shortened for an error message."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of over 20 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
