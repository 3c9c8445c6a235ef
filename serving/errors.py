"""What can go wrong between a client and the model, by kind. The text of each says what, where and what to do."""

import re

from serving import protocol


class ServingError(Exception):
    """The server could not answer for a reason of its own; also the base of all the others."""

    code = protocol.INTERNAL


class InvalidRequest(ServingError):
    """The request itself is wrong; sent again it would be refused again."""

    code = protocol.INVALID


class TooLong(InvalidRequest):
    """The text, or with it the answer, is longer than the model's window."""


class UnknownAdapter(InvalidRequest):
    """No adapter of this name is served."""

    code = protocol.UNKNOWN_ADAPTER


class Busy(ServingError):
    """The server's queue is full; later there may be room."""

    code = protocol.BUSY


class Unavailable(ServingError):
    """Nothing answers, or the model is being started or stopped."""

    code = protocol.UNAVAILABLE


class DeadlineExceeded(ServingError):
    """The next token, or the whole answer, did not come in time."""

    code = "deadline"


_KINDS = {kind.code: kind for kind in (InvalidRequest, UnknownAdapter, Busy, Unavailable, ServingError)}
# As the embedded engine says it, and vLLM.
_TOO_LONG = re.compile(r"the prompt has [\d,]+ (tokens|characters)|maximum (context|model) length", re.I)
_CODED = re.compile(rf"\b({'|'.join(_KINDS)}): (.*)", re.DOTALL)
# What Triton itself says while the model is being loaded, has been unloaded, or has lost its process.
_NOT_LOADED = re.compile(r"unknown model|not ready|no available versions|unavailable|stub process|shutting down", re.I)


def error_of(text: str, where: str) -> ServingError:
    """The error behind the `text` of a Triton response from `where`: `busy: …` is a `Busy`."""
    coded = _CODED.search(text)
    if coded:
        kind, sentence = _KINDS[coded[1]], coded[2].strip()
        if kind is InvalidRequest and _TOO_LONG.search(sentence):
            return TooLong(sentence)
        return kind(sentence if issubclass(kind, InvalidRequest) else f"{where}: {sentence}")
    if _TOO_LONG.search(text):
        return TooLong(text.strip())
    if _NOT_LOADED.search(text):
        return Unavailable(f"{where}: the model does not answer just now ({text.strip()})")
    return ServingError(f"{where}: {text.strip()}")
