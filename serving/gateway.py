"""The gateway: an OpenAI-compatible HTTP server in front of Triton.

    python -m serving.gateway --triton 127.0.0.1:8001 --port 9000        (`make serve` starts it)

    OpenAI(base_url="http://127.0.0.1:9000/v1", api_key="-").chat.completions.create(model="slang", messages=[…])

It serves /v1/models, /v1/chat/completions and /v1/completions (openai_api.py), /v1/responses (openai_responses.py),
Triton's own generate endpoints below /v2 (gateway_triton.py), /metrics and /triton/metrics for Prometheus, and /health:
200 where a token can be generated, or the engine is at work for others. If SERVING_API_KEY is set (several keys are
separated by commas), /v1 and /v2 require one of them. It logs one line of JSON for each request to standard error; with
SERVING_LOG_TEXT=1 prompts and answers too. When a caller disconnects, its answer is cancelled in the engine.

With --check-adapters, /health fails until each adapter was seen to change what the base says (adapter_check.py).
"""

import argparse
import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.client import (
    BASE,
    DEFAULT_URL,
    AnswerPart,
    AsyncClient,
    AsyncStream,
    InvalidRequest,
    ServingError,
    Unavailable,
)
from serving.client.transport import connect
from serving.gateway_callers import Callers, RequestLimits
from serving.gateway_health import Health
from serving.gateway_records import NOBODY, GatewayMetrics, Record, log, log_to_stderr
from serving.gateway_responses import GONE, STOPPED, Events, refusal, until_gone
from serving.gateway_triton import TritonHttp
from serving.http_connections import LimitedConnection
from serving.openai_api import ApiError, ChatCompletion, Completion, Reply, TextCompletion, models
from serving.openai_responses import ModelResponse
from serving.protocol import CANCELLED
from serving.server_options import checked_origin

RETRY_SECONDS = 3.0  # while Triton is busy or unavailable
HEALTH_DEADLINE = 5.0
DRAIN_SECONDS = 7  # for answers to finish after SIGTERM; those that do not are ended with an error
LAST_SECONDS = 2  # for these errors to reach their callers
CONNECTIONS = 500  # at once, and at least four for each concurrent request, since pools keep some that have none


class Gateway:
    """What the routes share.

    Args:
        client: sends the requests.
        callers: who may send them.
        log_text: whether prompts and answers are logged.
    """

    def __init__(self, client: AsyncClient, callers: Callers, log_text: bool) -> None:
        self.client, self.callers, self.metrics = client, callers, GatewayMetrics()
        self._log_text = log_text
        self._streams: set[AsyncStream] = set()
        self._is_stopping = False
        self._served = {BASE.name}  # models that have answered; only their names become labels of metrics
        self._started = int(time.time())

    async def complete(self, request: Request, kind: type[Completion]) -> Response:
        """Answer one request of `kind`, as a whole or as server-sent events."""
        record, form = Record(self.metrics, request.url.path), None
        try:
            record.caller = self.callers.identify(request)
            self.callers.count(record.caller)
            form = kind.read(await self.callers.body(request))
            self.callers.check_room(record.caller, form.answers)
            record.model = form.model if form.model in self._served else NOBODY
            await form.settle(self.client)
            return await self._answer(request, form, record)
        except ApiError as error:
            record.error = error.code or "invalid"
            record.end(error.status)
            return refusal(error)
        except ServingError as error:
            shown = self._shown(error, form)
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

    async def _answer(self, request: Request, form: Completion, record: Record) -> Response:
        reply, stream, count = form.reply(), form.send(self.client), form.answers
        record.id, record.stream = reply.id, bool(form.stream)
        leaving = asyncio.create_task(_cancel_when_gone(request, stream))
        self.callers.enter(record.caller, count)
        self._streams.add(stream)

        def close() -> int:
            """Release what the answer held; its HTTP status."""
            self.callers.leave(record.caller, count)
            self._streams.discard(stream)
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
            self._check(stream)
            if stream.answer.output_tokens:
                self._served.add(form.model)
                record.model = form.model
                record.token()
            if form.stream:
                return Events(self._events(reply, stream, first, record), lambda: record.end(close()))
            async for _ in stream:
                pass
            self._check(stream)
        except BaseException:
            close()
            raise
        status = close()
        record.end(status)
        return JSONResponse(reply.whole(stream.answer), status)

    async def _events(
        self, reply: Reply, stream: AsyncStream, first: AnswerPart | None, record: Record
    ) -> AsyncIterator[str]:
        yield reply.chunk(first or AnswerPart("", ""), stream.answer)
        try:
            while (part := await stream.part()) is not None:
                yield reply.chunk(part, stream.answer)
            self._check(stream)
        except ServingError as error:
            record.error = str(error)
            yield reply.failure(self._shown(error, reply.form))
        except ApiError as error:
            record.error = error.code
            yield reply.failure(error)
        else:
            yield reply.last(stream.answer)

    def _check(self, stream: AsyncStream) -> None:
        """
        Raises:
            ApiError: `stop` has ended this answer.
        """
        if self._is_stopping and stream.answer.finish_reason == CANCELLED:
            raise self._shown(Unavailable())

    def _shown(self, error: ServingError, form: Completion | None = None) -> ApiError:
        """The error to answer with. In a stop the server behind may end first, which is the same stop."""
        if self._is_stopping and isinstance(error, Unavailable):
            return ApiError(503, STOPPED, "unavailable", retry_after=2)
        shown = ApiError.of(error)
        return form.named_as_sent(shown) if form else shown

    def stop(self, seconds: float) -> None:
        """Let what is being answered end within `seconds`; then end it with an error that says so."""
        self._is_stopping = True

        def end() -> None:
            for stream in self._streams:
                stream.cancel()

        asyncio.get_running_loop().call_later(seconds, end)

    async def models(self, request: Request) -> list[dict[str, Any]]:
        """The entries of /v1/models, for a caller that is allowed to see them."""
        self.callers.count(self.callers.identify(request))
        return models(await self.client.adapters(), self._started)


async def _cancel_when_gone(request: Request, stream: AsyncStream) -> None:
    await until_gone(request)
    stream.cancel()


class DrainingServer(uvicorn.Server):
    """uvicorn, which otherwise cuts off what is not answered in time without a word."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        gateway: Gateway = self.config.app.state.gateway
        gateway.stop(DRAIN_SECONDS)
        self.config.app.state.triton.stop(DRAIN_SECONDS)
        await super().shutdown(sockets)


def create_app(options: argparse.Namespace, callers: Callers, log_text: bool) -> FastAPI:
    """The gateway's routes, for the arguments of its command line."""
    triton, ca_file, check = options.triton, options.ca_file, options.check_adapters

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        probe = AsyncClient(
            triton, ca_file=ca_file, token_deadline=HEALTH_DEADLINE, deadline=HEALTH_DEADLINE, retry_for=0
        )
        async with AsyncClient(triton, ca_file=ca_file, retry_for=RETRY_SECONDS) as client, probe:
            app.state.gateway = gateway = Gateway(client, callers, log_text)
            app.state.triton = TritonHttp(options.triton_http, options.triton_metrics, callers, gateway.metrics)
            app.state.health = health = Health(client, probe, is_checked=not check)
            checking = asyncio.create_task(health.check_adapters() if check else asyncio.sleep(0))
            yield
            checking.cancel()
            await app.state.triton.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    if options.allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allow_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["retry-after", "x-should-retry"],
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await app.state.gateway.complete(request, ChatCompletion)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await app.state.gateway.complete(request, TextCompletion)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await app.state.gateway.complete(request, ModelResponse)

    @app.api_route("/v1/responses/{name}", methods=["GET", "DELETE"])
    async def kept_response(name: str) -> Response:
        raise ApiError(404, "responses are not kept: each is there only in the answer to its request", "not_found")

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
        status, body = await app.state.health.now()
        return JSONResponse(body, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(app.state.gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/triton/metrics")
    async def metrics_of_triton() -> Response:
        return await app.state.triton.metrics()

    @app.api_route("/v2{path:path}", methods=["GET", "POST"])
    async def triton_http(request: Request) -> Response:
        return await app.state.triton.answer(request)

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
        "--triton-http", metavar="URL", help="Triton's HTTP: checked requests to /v2 are passed on to it; default: none"
    )
    parser.add_argument("--triton-metrics", metavar="URL", help="of Triton's metrics, to show them as /triton/metrics")
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page's origin from which browsers may call (CORS); may be given several times; default: none",
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
        help=f"concurrent answers, default {RequestLimits.concurrent}",
    )
    parser.add_argument(
        "--keep-alive",
        type=int,
        default=RequestLimits.keep_alive,
        metavar="SECONDS",
        help=f"for which a connection without a request is kept, default {RequestLimits.keep_alive}",
    )
    parser.add_argument(
        "--check-adapters", action="store_true", help="/health fails if an adapter answers exactly as the base"
    )
    options = parser.parse_args()
    keys = [key.strip() for key in os.environ.get("SERVING_API_KEY", "").split(",") if key.strip()]
    limits = RequestLimits(options.max_body, options.per_minute, options.concurrent, options.keep_alive)
    log_to_stderr()
    try:
        # Check the addresses before listening.
        connect(options.triton, {}, options.ca_file)
        options.allow_origin = [checked_origin(origin) for origin in options.allow_origin]
        listening = socket.create_server((options.host, options.port), backlog=512)
    except InvalidRequest as error:
        parser.error(f"--triton: {error}")
    except ValueError as error:
        parser.error(f"--allow-origin: {error}")
    except (OSError, OverflowError) as error:
        print(
            f"error: the gateway cannot listen on {options.host}:{options.port} ({error}); choose another --port",
            file=sys.stderr,
        )
        sys.exit(2)
    if not keys and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        log.warning("SERVING_API_KEY is not set: everybody who can reach this port can use the model")
    log_text = os.environ.get("SERVING_LOG_TEXT") == "1"
    app = create_app(options, Callers(limits, keys), log_text)
    server = DrainingServer(
        uvicorn.Config(
            app,
            http=LimitedConnection,
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=max(CONNECTIONS, 4 * limits.concurrent),
            timeout_keep_alive=limits.keep_alive,
            timeout_graceful_shutdown=DRAIN_SECONDS + LAST_SECONDS,
        )
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again after draining
    log.info("listening", extra={"fields": {"url": f"http://{options.host}:{options.port}", "triton": options.triton}})
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


if __name__ == "__main__":
    main()
