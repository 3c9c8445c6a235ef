"""The client's exceptions. Each message says what happened, where, and what to do about it."""

import re


class ServingError(Exception):
    """The server failed at this request; also the base class of all other errors of the client.

    Attributes:
        code: the kind of error as the server names it, at the start of the error's text.
    """

    code = "internal"


class InvalidRequest(ServingError):
    """The request itself is wrong; sending it again will not help."""

    code = "invalid"


class TooLong(InvalidRequest):
    """The prompt, or the prompt and `max_tokens` together, exceed the model's context window."""


class UnknownAdapter(InvalidRequest):
    """No adapter of this name is served."""

    code = "unknown_adapter"


class Busy(ServingError):
    """The server's queue is full; try again later."""

    code = "busy"


class Unavailable(ServingError):
    """No server answers at this address, or the model is being started or stopped."""

    code = "unavailable"


class DeadlineExceeded(ServingError):
    """The next token, or the complete answer, did not arrive in time."""

    code = "deadline"


_KINDS = {kind.code: kind for kind in (InvalidRequest, UnknownAdapter, Busy, Unavailable, ServingError)}
# The wording of the embedded engine, and of vLLM.
_TOO_LONG = re.compile(r"the prompt has [\d,]+ (tokens|characters)|maximum (context|model) length", re.I)
_CODED = re.compile(rf"\b({'|'.join(_KINDS)}): (.*)", re.DOTALL)
# Triton's own wording while the model is being loaded, has been unloaded, or has lost its process.
_NOT_LOADED = re.compile(r"unknown model|not ready|no available versions|unavailable|stub process|shutting down", re.I)


def error_of(text: str, where: str) -> ServingError:
    """The exception for the error `text` of a Triton response from `where`: `busy: …` becomes a `Busy`."""
    coded = _CODED.search(text)
    if coded:
        kind, sentence = _KINDS[coded[1]], coded[2].strip()
        if kind is InvalidRequest and _TOO_LONG.search(sentence):
            return TooLong(sentence)
        return kind(sentence if issubclass(kind, InvalidRequest) else f"{where}: {sentence}")
    if _TOO_LONG.search(text):
        return TooLong(text.strip())
    if _NOT_LOADED.search(text):
        return Unavailable(f"{where}: the model is not available at the moment ({text.strip()})")
    return ServingError(f"{where}: {text.strip()}")
