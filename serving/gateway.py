"""The gateway: an OpenAI-compatible HTTP server in front of Triton.

    python -m serving.gateway --triton 127.0.0.1:8001 --port 9000        (`make serve` starts it)

    OpenAI(base_url="http://127.0.0.1:9000/v1", api_key="-").chat.completions.create(model="slang", messages=[…])

It serves /v1/models, /v1/chat/completions and /v1/completions (openai_api.py), /health, which generates a token, and
/metrics for Prometheus. If SERVING_API_KEY is set (several keys are separated by commas), /v1 requires one of them. It
logs one line of JSON for each request to standard error; with SERVING_LOG_TEXT=1 prompts and answers too. When a caller
disconnects, its answer is cancelled in the engine.

With --check-adapters, /health fails until each adapter was seen to change what the base says (adapter_check.py).
"""

import argparse
import asyncio
import contextlib
import hmac
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serving.adapter_check import changes_nothing
from serving.client import BASE, DEFAULT_URL, AnswerPart, AsyncClient, AsyncStream, Busy, InvalidRequest, ServingError
from serving.client.transport import connect
from serving.gateway_records import NOBODY, GatewayMetrics, Record, log, log_to_stderr
from serving.openai_api import ApiError, ChatCompletion, Completion, Reply, TextCompletion, models
from serving.protocol import CANCELLED
from serving.rate_limit import Rate, RateLimiter, client_of

BODY_SECONDS = 30.0  # for a request's body to arrive in
RETRY_SECONDS = 3.0  # while Triton is busy or unavailable
HEALTH_SECONDS = 1.0  # for which an answer of /health is cached
HEALTH_DEADLINE = 5.0
DRAIN_SECONDS = 8  # for answers to finish after SIGTERM
WRONG_KEYS = 10  # a minute from one address; more, and its requests are refused for a while, whatever their key
DOES_NOTHING = "answers as the base does: it is empty, or the engine ignores it"
GONE = 499  # nginx's status for a client that has disconnected


@dataclass(frozen=True)
class RequestLimits:
    """What is accepted.

    Attributes:
        body: bytes of a request.
        per_minute: requests of one caller a minute; 0: any number.
        concurrent: requests of all callers at once.
    """

    body: int = 1 << 20
    per_minute: float = 0
    concurrent: int = 128


class Gateway:
    """What the routes share.

    Args:
        client: sends the requests.
        probe: sends those of /health.
        keys: the accepted API keys; none: no key is required.
        log_text: whether prompts and answers are logged.
        is_checked: whether `check_adapters` has nothing to do.
    """

    def __init__(
        self,
        client: AsyncClient,
        probe: AsyncClient,
        limits: RequestLimits,
        keys: list[str],
        log_text: bool,
        is_checked: bool = True,
    ) -> None:
        self.client, self.metrics = client, GatewayMetrics()
        self._probe, self._limits, self._log_text = probe, limits, log_text
        self._keys = [key.encode() for key in keys]
        self._limiter = RateLimiter()
        self._open = 0
        self._served = {BASE.name}  # models that have answered; only their names become labels of metrics
        self._health: tuple[float, int, dict[str, Any]] = (float("-inf"), 0, {})
        # The body of /health while the adapters are checked, or if one does nothing.
        self._unfit: dict[str, Any] | None = None if is_checked else {"status": "checking adapters"}
        self._probing = asyncio.Lock()
        self._started = int(time.time())

    def caller(self, request: Request) -> str:
        """Who sent the request: the number of its key, or its address where no key is required.

        Raises:
            ApiError: the key is missing or wrong, or too many wrong ones have come from this address.
        """
        address = client_of(request.scope)
        if not self._keys:
            return address
        guess = partial(
            self._take,
            f"wrong keys of {address}",
            per_minute=WRONG_KEYS,
            burst=WRONG_KEYS,
            refusal="too many wrong API keys from this address",
        )
        guess(0)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Compare with every key in constant time, so that the response time reveals nothing about them.
        right = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(right):
            if given:
                guess(1)
            raise ApiError(
                401,
                "the API key is missing or wrong; send one of SERVING_API_KEY as Authorization: Bearer KEY",
                "invalid_api_key",
            )
        return f"key {right.index(True) + 1}"

    def count(self, caller: str) -> None:
        """Count a request of `caller`.

        Raises:
            ApiError: it has sent more requests than it may.
        """
        if rate := self._limits.per_minute:
            self._take(caller, 1, rate, max(1.0, rate / 6), f"more than {rate:g} requests a minute")

    def _take(self, whose: str, count: int, per_minute: float, burst: float, refusal: str) -> None:
        """Take `count` from a bucket that holds `burst` and is filled `per_minute`.

        Raises:
            ApiError: `refusal`, as there is less than one in it.
        """
        if wait := self._limiter.take(whose, Rate(per_minute, burst), count):
            raise ApiError(429, refusal, "rate_limit_exceeded", retry_after=wait)

    async def complete(self, request: Request, kind: type[Completion]) -> Response:
        """Answer one request of `kind`, as a whole or as server-sent events."""
        record = Record(self.metrics, request.url.path)
        try:
            record.caller = self.caller(request)
            self.count(record.caller)
            form = kind.read(await self._body(request))
            if self._open >= self._limits.concurrent:
                raise ApiError(429, "too many requests are being answered; try again shortly", "busy", retry_after=1)
            record.model = form.model if form.model in self._served else NOBODY
            await form.settle(self.client)
            return await self._answer(request, form, record)
        except ApiError as error:
            record.error = error.code or "invalid"
            record.end(error.status)
            return refusal(error)
        except ServingError as error:
            shown = ApiError.of(error)
            record.error = error.code if isinstance(error, InvalidRequest) else str(error)
            record.end(shown.status)
            return refusal(shown)
        except ClientDisconnect:
            record.end(GONE)
            return Response(status_code=GONE)
        except BaseException as error:
            record.error = type(error).__name__
            record.end(500)
            raise

    async def _body(self, request: Request) -> bytes:
        limit, body = self._limits.body, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise ApiError(413, f"the request is larger than {limit:,} bytes", "request_too_large")
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:g} s") from None
        return bytes(body)

    async def _answer(self, request: Request, form: Completion, record: Record) -> Response:
        reply, stream = Reply(form), form.send(self.client)
        record.id, record.stream = reply.id, bool(form.stream)
        leaving = asyncio.create_task(_cancel_when_gone(request, stream))
        self._open += 1

        def close() -> int:
            """Release what the answer held; its HTTP status."""
            self._open -= 1
            # A connection also counts as closed once its answer has been sent.
            has_left = leaving.done() and stream.answer.finish_reason == CANCELLED and not record.error
            leaving.cancel()
            stream.cancel()
            answer = stream.answer
            record.input_tokens, record.output_tokens = answer.input_tokens, answer.output_tokens
            record.finish_reason = answer.finish_reason if answer.output_tokens else None
            if self._log_text:
                record.texts = {"request": form.model_dump(exclude_none=True), "answer": answer.text}
            return GONE if has_left else 200

        try:
            first = await stream.part()  # errors up to here have an HTTP status of their own
            if stream.answer.output_tokens:
                self._served.add(form.model)
                record.model = form.model
                record.token()
            if form.stream:
                return Events(_events(reply, stream, first, record), lambda: record.end(close()))
            async for _ in stream:
                pass
        except BaseException:
            close()
            raise
        status = close()
        record.end(status)
        return JSONResponse(reply.whole(stream.answer), status)

    async def check_adapters(self) -> None:
        """Compare each adapter with the base once the server is ready; /health fails until all are found to differ.

        A server whose adapter does nothing must not take the place of one that works: it would answer, wrongly.
        """
        while not await self.client.is_ready():
            await asyncio.sleep(1)
        wrong = []
        for adapter in await self.client.adapters():
            try:
                if await changes_nothing(self.client, adapter.name):
                    wrong.append(f"adapter {adapter.name} {DOES_NOTHING}")
            except ServingError as error:
                wrong.append(f"adapter {adapter.name} cannot be asked: {ApiError.of(error).message}")
        for sentence in wrong:
            log.error(sentence)
        self._unfit = {"status": "wrong adapters", "error": "; ".join(wrong)} if wrong else None

    async def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health: whether a token can be generated, at most `HEALTH_SECONDS` old."""
        if self._unfit:
            return 503, self._unfit
        async with self._probing:
            if time.monotonic() - self._health[0] > HEALTH_SECONDS:
                begin = time.monotonic()
                try:
                    await self._probe.generate("Hello", max_tokens=1, temperature=0)
                    found = 200, {"status": "ok", "seconds": round(time.monotonic() - begin, 4)}
                except Busy:  # with the requests of others
                    found = 200, {"status": "busy"}
                except ServingError as error:
                    found = 503, {"status": "failing", "error": ApiError.of(error).message}
                self._health = (time.monotonic(), *found)
            return self._health[1:]

    async def models(self, request: Request) -> list[dict[str, Any]]:
        """The entries of /v1/models, for a caller that is allowed to see them."""
        self.count(self.caller(request))
        return models(await self.client.adapters(), self._started)


class Events(StreamingResponse):
    """Server-sent events; `end` is called when they are over, however they end."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _events(reply: Reply, stream: AsyncStream, first: AnswerPart | None, record: Record) -> AsyncIterator[str]:
    yield reply.chunk(first or AnswerPart("", ""), first=True)
    try:
        while (part := await stream.part()) is not None:
            yield reply.chunk(part, first=False)
    except ServingError as error:
        record.error = str(error)
        yield reply.failure(ApiError.of(error))
    else:
        yield reply.last(stream.answer)


async def _cancel_when_gone(request: Request, stream: AsyncStream) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stream.cancel()


def refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


def create_app(
    triton: str, ca_file: Path | None, limits: RequestLimits, keys: list[str], log_text: bool, check: bool
) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        probe = AsyncClient(
            triton, ca_file=ca_file, first_token_deadline=HEALTH_DEADLINE, deadline=HEALTH_DEADLINE, retry_for=0
        )
        async with AsyncClient(triton, ca_file=ca_file, retry_for=RETRY_SECONDS) as client, probe:
            app.state.gateway = gateway = Gateway(client, probe, limits, keys, log_text, not check)
            checking = asyncio.create_task(gateway.check_adapters() if check else asyncio.sleep(0))
            yield
            checking.cancel()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await app.state.gateway.complete(request, ChatCompletion)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await app.state.gateway.complete(request, TextCompletion)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await app.state.gateway.models(request)})

    @app.get("/v1/models/{name}")
    async def show_model(request: Request, name: str) -> Response:
        for model in await app.state.gateway.models(request):
            if model["id"] == name:
                return JSONResponse(model)
        raise ApiError(404, f"no model '{name}' is served", "model_not_found", "model")

    @app.get("/health")
    async def health() -> Response:
        status, body = await app.state.gateway.health()
        return JSONResponse(body, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(app.state.gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return refusal(error)

    @app.exception_handler(ServingError)
    async def serving_error(request: Request, error: ServingError) -> Response:
        return refusal(ApiError.of(error))

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        return refusal(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return refusal(ApiError(500, "the gateway failed at this request; its log has the details", "internal"))

    return app


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serving.gateway", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--triton", default=DEFAULT_URL, metavar="URL", help=f"default {DEFAULT_URL}")
    parser.add_argument(
        "--ca-file", type=Path, metavar="PEM", help="the authority that signed Triton's certificate, for grpcs://"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=9000, help="default 9000")
    parser.add_argument("--max-body", type=int, default=RequestLimits.body, metavar="BYTES", help="default 1 MiB")
    parser.add_argument(
        "--per-minute",
        type=float,
        default=RequestLimits.per_minute,
        metavar="N",
        help="requests of one key, or one address, a minute; default: any number",
    )
    parser.add_argument(
        "--concurrent",
        type=int,
        default=RequestLimits.concurrent,
        metavar="N",
        help=f"concurrent requests, default {RequestLimits.concurrent}",
    )
    parser.add_argument(
        "--check-adapters", action="store_true", help="/health fails if an adapter answers exactly as the base"
    )
    options = parser.parse_args()
    keys = [key.strip() for key in os.environ.get("SERVING_API_KEY", "").split(",") if key.strip()]
    limits = RequestLimits(options.max_body, options.per_minute, options.concurrent)
    log_to_stderr()
    try:
        # Check the address before listening.
        connect(options.triton, {}, options.ca_file)
        listening = socket.create_server((options.host, options.port), backlog=512)
    except InvalidRequest as error:
        parser.error(f"--triton: {error}")
    except (OSError, OverflowError) as error:
        print(
            f"error: the gateway cannot listen on {options.host}:{options.port} ({error}); choose another --port",
            file=sys.stderr,
        )
        sys.exit(2)
    if not keys and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        log.warning("SERVING_API_KEY is not set: everybody who can reach this port can use the model")
    log_text = os.environ.get("SERVING_LOG_TEXT") == "1"
    app = create_app(options.triton, options.ca_file, limits, keys, log_text, options.check_adapters)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=DRAIN_SECONDS
        )
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again after draining
    log.info("listening", extra={"fields": {"url": f"http://{options.host}:{options.port}", "triton": options.triton}})
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


if __name__ == "__main__":
    main()
