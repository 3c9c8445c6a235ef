"""Triton's HTTP through the gateway: requests are checked, written anew, and passed on.

    curl http://127.0.0.1:9000/v2/models/gemma/generate -d '{"text_input": "Hello! ", "parameters": {"max_tokens": 20}}'

The Triton of pip has known flaws in reading HTTP (SECURITY.md). So nothing reaches it as a client wrote it: the path is
one of a few, the body a JSON object within the gateway's limit, serialized again and sent whole with its length, and
the client's headers stay here. What controls models, shared memory, traces or logs is not passed on; nor is `infer`,
whose inputs may name shared memory. Keys, rates and places are those of /v1.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from serving import protocol
from serving.client.transport import CATALOGUE, CONNECT_SECONDS, FLAGS, MODEL
from serving.gateway_callers import Callers
from serving.gateway_records import GatewayMetrics, Record
from serving.gateway_responses import GONE, STOPPED, Events
from serving.openai_api import ApiError

HEALTH = re.compile("/v2/health/(live|ready)")
DESCRIPTION = re.compile(f"/v2(/models/({MODEL}|{CATALOGUE})(/versions/1)?(/(ready|config|stats))?)?")
GENERATION = re.compile(f"/v2/models/({MODEL}|{CATALOGUE})(/versions/1)?/generate(_stream)?")
METRICS_SECONDS = 5.0
MAX_TOKEN = (1 << 31) - 1  # of Triton's INT32
# Inputs of the model, each with the type of its values and what a refusal calls it.
INPUTS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("text_input", "sampling_parameters"), (str, "a text")),
    **dict.fromkeys((*FLAGS, "return_logprobs", "return_cumulative_logprob"), (bool, "true or false")),
    "prompt_token_ids": (int, f"a list of tokens, from 0 to {MAX_TOKEN}"),
}
CODES = {400: protocol.INVALID, 429: protocol.BUSY, 503: protocol.UNAVAILABLE}  # as the model's own errors begin
NO_SUCH_WAY = (
    "{method} {path} is not passed on to Triton; the gateway passes on /v2/models/gemma/generate, generate_stream and "
    "what describes the server. Anything else takes Triton's gRPC"
)


class TritonHttp:
    """One Triton behind the gateway.

    Args:
        url: of Triton's HTTP; None: nothing is passed on.
        metrics_url: of Triton's metrics; None: they are not shown.
    """

    def __init__(self, url: str | None, metrics_url: str | None, callers: Callers, metrics: GatewayMetrics) -> None:
        self._url, self._metrics_url = url, metrics_url
        self._callers, self._metrics = callers, metrics
        self._client = httpx.AsyncClient(
            base_url=url or "",
            trust_env=False,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # a long prompt is read for minutes
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )
        self._stops_at: float | None = None  # by the event loop's clock
        self._waits: set[asyncio.Timeout] = set()

    async def close(self) -> None:
        await self._client.aclose()

    def stop(self, seconds: float) -> None:
        """Let what is being answered end within `seconds`; then end it with an error that says so."""
        self._stops_at = asyncio.get_running_loop().time() + seconds
        for wait in self._waits:
            wait.reschedule(self._stops_at)

    async def answer(self, request: Request) -> Response:
        """Answer a request to /v2. Refusals have Triton's form."""
        path = request.url.path
        try:
            if self._url is None:
                raise ApiError(404, "this gateway has no HTTP of Triton behind it (--triton-http); use /v1")
            if request.method == "POST" and GENERATION.fullmatch(path):
                return await self._generate(request, path)
            if request.method == "GET" and HEALTH.fullmatch(path):
                return await self._describe(path)
            if request.method == "GET" and DESCRIPTION.fullmatch(path):
                self._callers.count(self._callers.identify(request))
                return await self._describe(path)
            raise ApiError(404, NO_SUCH_WAY.format(method=request.method, path=path))
        except ApiError as error:
            code = CODES.get(error.status)
            text = f"{code}: {error.message}" if code else error.message
            return JSONResponse({"error": text}, error.status, error.headers())

    async def metrics(self) -> Response:
        """Triton's metrics, as it shows them.

        Raises:
            ApiError: it does not, or not in time.
        """
        if self._metrics_url is None:
            raise ApiError(404, "this gateway does not know where Triton's metrics are (--triton-metrics)")
        try:
            answer = await self._client.get(self._metrics_url, timeout=METRICS_SECONDS)
        except httpx.HTTPError as error:
            raise ApiError(503, "Triton does not show its metrics just now", "unavailable", retry_after=2) from error
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    async def _describe(self, path: str) -> Response:
        return await self._whole(await self._sent("GET", path, None))

    async def _generate(self, request: Request, path: str) -> Response:
        record = Record(self._metrics, path)
        try:
            record.caller = self._callers.identify(request)
            self._callers.count(record.caller)
            content = rewritten(await self._callers.body(request))
            self._callers.check_room(record.caller)
        except ApiError as error:
            record.error = error.code or "invalid"
            record.end(error.status)
            raise
        except ClientDisconnect:
            record.end(GONE)
            return Response(status_code=GONE)
        self._callers.enter(record.caller)

        def close(status: int) -> None:
            self._callers.leave(record.caller)
            record.end(status)

        try:
            # Who leaves before an answer begins keeps the place: Triton does not notice until then.
            answer = await self._sent("POST", path, content)
            if path.endswith("_stream") and answer.status_code == 200:
                return Events(self._events(answer, record), lambda: close(200))
            response = await self._whole(answer)
        except ApiError as error:
            record.error = error.code
            close(error.status)
            raise
        except BaseException as error:
            record.error = type(error).__name__
            close(500)
            raise
        close(response.status_code)
        return response

    async def _sent(self, method: str, path: str, content: bytes | None) -> httpx.Response:
        """Triton's answer, of which only the header has been read.

        Raises:
            ApiError: there is none, or the gateway is stopped.
        """
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        request = self._client.build_request(method, path, content=content, headers=headers)
        with self._translated():
            async with self._until_stopped():
                return await self._client.send(request, stream=True)

    async def _whole(self, answer: httpx.Response) -> Response:
        with self._translated():
            try:
                async with self._until_stopped():
                    content = await answer.aread()
            finally:
                await answer.aclose()
        return Response(content, answer.status_code, media_type=answer.headers.get("content-type"))

    async def _events(self, answer: httpx.Response, record: Record) -> AsyncIterator[bytes]:
        chunks, is_first = answer.aiter_raw(), True
        try:
            while True:
                with self._translated():
                    async with self._until_stopped():
                        chunk = await anext(chunks, None)
                if chunk is None:
                    return
                if is_first:
                    record.token()
                is_first = False
                yield chunk
        except ApiError as error:
            record.error = error.code
            yield b'\n\ndata: {"error": "%s: %s"}\n\n' % (protocol.UNAVAILABLE.encode(), error.message.encode())
        finally:
            await answer.aclose()

    @contextlib.asynccontextmanager
    async def _until_stopped(self) -> AsyncIterator[None]:
        async with asyncio.timeout_at(self._stops_at) as wait:
            self._waits.add(wait)
            try:
                yield
            finally:
                self._waits.discard(wait)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """
        Raises:
            ApiError: Triton could not be reached or has ended, or the gateway is stopped.
        """
        try:
            yield
        except TimeoutError:
            raise ApiError(503, STOPPED, "unavailable", retry_after=2) from None
        except httpx.HTTPError as error:
            text = STOPPED if self._stops_at else "the model is being started or stopped; try again shortly"
            raise ApiError(503, text, "unavailable", retry_after=2) from error


def rewritten(body: bytes) -> bytes:
    """A JSON object as this program writes it.

    Raises:
        ApiError: it is none, or has an input that Triton would call its own failure (500), or would wrap: of tokens it
            takes the last 32 bits.
    """
    try:
        value = json.loads(body)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        value, text = None, b""
    if not isinstance(value, dict):
        raise ApiError(400, 'the body is not a JSON object in UTF-8, such as {"text_input": "Hello!"}')
    for name, (kind, wanted) in INPUTS.items():
        one_or_more = value.get(name, [])
        given: list[Any] = one_or_more if isinstance(one_or_more, list) else [one_or_more]
        is_of_kind = all(type(one) is kind for one in given)  # true is no number here
        if not is_of_kind or (kind is int and not all(0 <= one <= MAX_TOKEN for one in given)):
            raise ApiError(400, f"{name} is not {wanted}", param=name)
    return text
