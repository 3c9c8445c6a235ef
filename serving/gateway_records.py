"""What is known of the door's requests afterwards: Prometheus metrics, and a line of JSON each in the log."""

import json
import logging
import sys
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()  # a second series beside each counter
log = logging.getLogger("serving.gateway")
# Seconds: from a quick first token on an idle machine to the last that the client waits for.
BUCKETS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 60.0, 120.0)
NEXT_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6)
NOBODY = ""  # the model of a request that named none that is served: a label of its own for each would fill memory


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry}
        times: dict[str, Any] = {"labelnames": ["model"], "buckets": BUCKETS, **given}
        self.requests = Counter("door_requests", "Requests", ["path", "model", "status"], **given)
        self.tokens = Counter("door_tokens", "Tokens; kind is input or output", ["model", "kind"], **given)
        self.first_token = Histogram("door_first_token_seconds", "From a request to its first token", **times)
        self.next_token = Histogram(
            "door_next_token_seconds",
            "From a token to the next one, on average of each answer",
            **times | {"buckets": NEXT_TOKEN_BUCKETS},
        )
        self.seconds = Histogram("door_request_seconds", "From a request to its end", **times)
        self.in_flight = Gauge("door_in_flight", "Requests being answered", **given)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Record:
    """One request, from its arrival to its end. `texts` are logged as they are; `error` has nothing a caller wrote."""

    def __init__(self, metrics: Metrics, path: str) -> None:
        self._metrics, self._path = metrics, path
        self._begin = time.monotonic()
        self._first: float | None = None
        self.id, self.caller, self.model, self.stream = "", "", NOBODY, False
        self.input_tokens = self.output_tokens = 0
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.texts: dict[str, Any] = {}
        metrics.in_flight.inc()

    def token(self) -> None:
        self._first = time.monotonic() - self._begin

    def end(self, status: int) -> None:
        metrics, seconds = self._metrics, time.monotonic() - self._begin
        metrics.in_flight.dec()
        metrics.requests.labels(self._path, self.model, status).inc()
        metrics.seconds.labels(self.model).observe(seconds)
        if self._first is not None:
            metrics.first_token.labels(self.model).observe(self._first)
            if self.output_tokens > 1:
                metrics.next_token.labels(self.model).observe((seconds - self._first) / (self.output_tokens - 1))
            metrics.tokens.labels(self.model, "input").inc(self.input_tokens)
            metrics.tokens.labels(self.model, "output").inc(self.output_tokens)
        line = {
            "id": self.id,
            "caller": self.caller,
            "path": self._path,
            "model": self.model,
            "stream": self.stream,
            "status": status,
            "finish_reason": self.finish_reason,
            "seconds": round(seconds, 4),
            "first_token_seconds": self._first and round(self._first, 4),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "error": self.error,
            **self.texts,
        }
        log.info("request", extra={"fields": {name: value for name, value in line.items() if value not in (None, "")}})


class JsonLines(logging.Formatter):
    """A record of any logger as one line of JSON, with the `fields` it was given."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
