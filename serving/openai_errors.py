"""Errors in OpenAI's format."""

import math
import re
from typing import Any

from serving.client import Busy, DeadlineExceeded, InvalidRequest, ServingError, TooLong, Unavailable, UnknownAdapter
from serving.openai_parameters import SAMPLING

OTHERS = (
    "messages",
    "prompt",
    "tools",
    "response_format",
    "max_completion_tokens",
    "top_logprobs",
    "echo",
)  # that errors are about


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
                return cls(400, str(error), "context_length_exceeded", named_parameter(str(error)))
            case InvalidRequest():
                return cls(400, str(error), param=named_parameter(str(error)))
            case Busy():
                return cls(429, "too many requests are waiting; try again shortly", "busy", retry_after=1)
            case Unavailable():
                return cls(
                    503, "the model is being started or stopped; try again shortly", "unavailable", retry_after=2
                )
            case DeadlineExceeded():
                return cls(504, "the model did not answer in time; try again later", "deadline")
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


def named_parameter(message: str) -> str | None:
    """The parameter that an error message begins with; None where it begins with none."""
    found = re.match(r"(?:the )?(\w+)", message)
    return found[1] if found and found[1] in (*SAMPLING, *OTHERS) else None
