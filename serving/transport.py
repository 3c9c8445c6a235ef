"""How one request reaches Triton and its answer comes back, over gRPC or over HTTP.

gRPC opens a bidirectional stream for each request, many at once on one connection; ending it cancels the request in the
engine. HTTP posts to `/generate_stream` and reads server-sent events: tritonclient's own HTTP client knows one response
a request, which a model that streams does not give. Both speak the inputs and outputs of NVIDIA's vLLM backend.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from serving.errors import Busy, DeadlineExceeded, InvalidRequest, ServingError, Unavailable, error_of

MODEL, CATALOGUE = "gemma", "adapters"
# Asked of every request, beside text and sampling parameters.
FLAGS = {
    "stream": True,
    "exclude_input_in_output": True,
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
}
CONNECT_SECONDS = 5.0  # a machine that does not exist answers nothing at all
LARGEST = 64 << 20  # bytes of a message; the server's own limits are narrower


class Part(NamedTuple):
    """A piece of an answer: its text, how many tokens it is made of, and, in the last one, why the model ended."""

    text: str
    finish_reason: str | None
    input_tokens: int
    output_tokens: int


class Transport(Protocol):
    """One connection to a server, for any number of requests at once, in the event loop that it was made in."""

    def parts(self, text: str, sampling: str) -> AsyncGenerator[Part, None]:
        """An answer as it comes. Closing the iterator early cancels the request in the engine.

        Args:
            sampling: the JSON of vLLM's sampling parameters.

        Raises:
            ServingError: of the kind that fits; never an exception of grpc or httpx.
        """

    async def catalogue(self, name: str) -> str:
        """The JSON of the adapters served; of one of them where `name` is not ""."""

    async def ready(self) -> bool:
        """Whether the server says that the model can be asked."""

    async def close(self) -> None: ...


def connect(url: str, headers: Mapping[str, str], ca_file: Path | None) -> Transport:
    """A connection to `url`: HOST:PORT or grpc://, grpcs://, http://, https://. It is made when it is first needed.

    Raises:
        InvalidRequest: no such address, or no readable CA file.
    """
    scheme, rest = url.split("://", 1) if "://" in url else ("grpc", url)
    try:
        parts = urlsplit(f"//{rest}")
        known = scheme in ("grpc", "grpcs", "http", "https") and parts.hostname and parts.port
    except ValueError:
        known = None
    if not known:
        raise InvalidRequest(
            f"'{url}' is no address of a server: give HOST:PORT, as in 127.0.0.1:8001, or grpcs://… "
            f"for gRPC, http://127.0.0.1:8000 or https://… for HTTP"
        )
    if ca_file is not None and not ca_file.is_file():
        raise InvalidRequest(f"there is no CA file {ca_file}")
    if scheme.startswith("grpc"):
        return Grpc(rest.rstrip("/"), scheme == "grpcs", headers, ca_file)
    return Http(f"{scheme}://{rest}".rstrip("/"), headers, ca_file)


class Grpc:
    """tritonclient's asynchronous gRPC client."""

    def __init__(self, address: str, secure: bool, headers: Mapping[str, str], ca_file: Path | None) -> None:
        import tritonclient.grpc.aio  # noqa: F401  (takes a while, which is no part of the first answer's deadline)

        self._where, self._secure, self._ca_file = address, secure, ca_file
        self._headers = {name.lower(): value for name, value in headers.items()}  # gRPC takes no capitals

    @cached_property
    def _client(self) -> Any:
        from tritonclient.grpc import aio

        options = [
            ("grpc.max_send_message_length", LARGEST),
            ("grpc.max_receive_message_length", LARGEST),
            # After a restart of the server: gRPC waits up to two minutes otherwise.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", int(CONNECT_SECONDS * 1000)),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        return aio.InferenceServerClient(
            self._where, ssl=self._secure, root_certificates=self._ca_file and str(self._ca_file), channel_args=options
        )

    async def parts(self, text: str, sampling: str) -> AsyncGenerator[Part, None]:
        inputs = [_bytes("text_input", text), _bytes("sampling_parameters", sampling)]
        inputs += [_bool(name, value) for name, value in FLAGS.items()]

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": MODEL, "inputs": inputs}

        responses = self._client.stream_infer(requests(), headers=self._headers)
        try:
            async for result, error in responses:
                if error is not None:
                    raise error_of(error.message(), self._where)
                yield Part(
                    b"".join(result.as_numpy("text_output")).decode(errors="replace"),
                    _reason(result.as_numpy("finish_reason")),
                    int(_number(result.as_numpy("num_input_tokens"))),
                    int(_number(result.as_numpy("num_output_tokens"))),
                )
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            # gRPC says so of a channel that was closed.
            raise ServingError(f"this client of {self._where} was closed before the answer was complete") from None
        except Exception as error:
            raise self._named(error) from None
        finally:
            responses.cancel()

    async def catalogue(self, name: str) -> str:
        try:
            result = await self._client.infer(CATALOGUE, [_bytes("name", name)], headers=self._headers)
        except Exception as error:
            raise self._named(error) from None
        return bytes(result.as_numpy("catalogue")[0]).decode()

    async def ready(self) -> bool:
        try:
            return bool(await self._client.is_model_ready(MODEL, headers=self._headers))
        except Exception as error:
            raise self._named(error) from None

    async def close(self) -> None:
        if "_client" in vars(self):
            await self._client.close()

    def _named(self, error: Exception) -> Exception:
        """What is to be raised for `error`, which gRPC or tritonclient raised, or this file."""
        import grpc
        from tritonclient.utils import InferenceServerException

        if isinstance(error, InferenceServerException):
            status, text = str(error.status() or "").removeprefix("StatusCode."), error.message()
        elif isinstance(error, grpc.RpcError):
            status, text = error.code().name, error.details() or ""
        else:
            return error
        where = self._where
        if status == "UNAVAILABLE" and ("connect" in text or "recvmsg" in text or "Socket" in text or not text):
            return Unavailable(
                f"nothing answers at {where} ({text}); start a server with make serve, or name its address"
            )
        if status in ("UNAVAILABLE", "CANCELLED"):
            return Unavailable(f"{where}: {text}")
        if status == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{where}: {text}")
        if status == "RESOURCE_EXHAUSTED":
            return (InvalidRequest if "larger than max" in text else Busy)(f"{where}: {text}")
        if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return InvalidRequest(f"{where} refuses this caller ({text}); give what it asks for in headers")
        return error_of(text, where)


class Http:
    """Triton's generate extension, through httpx."""

    def __init__(self, url: str, headers: Mapping[str, str], ca_file: Path | None) -> None:
        import httpx  # noqa: F401  (as above)

        self._where, self._headers, self._ca_file = url, dict(headers), ca_file

    @cached_property
    def _client(self) -> Any:
        import httpx

        return httpx.AsyncClient(
            base_url=self._where,
            headers=self._headers,
            trust_env=False,
            verify=ssl.create_default_context(cafile=self._ca_file) if self._where.startswith("https") else False,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # how long an answer may take is the caller's to say
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def parts(self, text: str, sampling: str) -> AsyncGenerator[Part, None]:
        body = {"text_input": text, "sampling_parameters": sampling, **FLAGS}
        try:
            async with self._client.stream("POST", f"/v2/models/{MODEL}/generate_stream", json=body) as response:
                if response.status_code != 200:
                    raise self._refused(response.status_code, await response.aread())
                async for event in _events(response.aiter_bytes()):
                    if "error" in event:
                        raise error_of(event["error"], self._where)
                    yield Part(
                        event.get("text_output", ""),
                        _reason([event.get("finish_reason")]),
                        int(event.get("num_input_tokens", 0)),
                        int(event.get("num_output_tokens", 0)),
                    )
        except Exception as error:
            raise self._named(error) from None

    async def catalogue(self, name: str) -> str:
        body = {"inputs": [{"name": "name", "shape": [1], "datatype": "BYTES", "data": [name]}]}
        try:
            response = await self._client.post(f"/v2/models/{CATALOGUE}/infer", json=body)
        except Exception as error:
            raise self._named(error) from None
        if response.status_code != 200:
            raise self._refused(response.status_code, response.content)
        return str(response.json()["outputs"][0]["data"][0])

    async def ready(self) -> bool:
        try:
            return (await self._client.get(f"/v2/models/{MODEL}/ready")).status_code == 200
        except Exception as error:
            raise self._named(error) from None

    async def close(self) -> None:
        if "_client" in vars(self):
            await self._client.aclose()

    def _refused(self, status: int, body: bytes) -> ServingError:
        try:
            text = str(json.loads(body.removeprefix(b"data:"))["error"])
        except (ValueError, KeyError, TypeError):
            text = body.decode(errors="replace")[:200].strip() or f"status {status}"
        found = error_of(text, self._where)
        if type(found) is not ServingError:
            return found
        if status in (401, 403):
            return InvalidRequest(f"{self._where} refuses this caller ({text}); give what it asks for in headers")
        if status == 429:
            return Busy(str(found))
        if status in (502, 503, 504):
            return Unavailable(str(found))
        return InvalidRequest(str(found)) if 400 <= status < 500 else found

    def _named(self, error: Exception) -> Exception:
        import httpx

        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return Unavailable(
                f"nothing answers at {self._where} ({error}); start a server with make serve, or name its address"
            )
        if isinstance(error, httpx.HTTPError):
            return Unavailable(f"{self._where}: the connection ended ({error or type(error).__name__})")
        return error


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of server-sent events. Bytes are cut at line feeds only: a text may hold Unicode's other line ends."""
    waiting = b""
    async for chunk in chunks:
        *lines, waiting = (waiting + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield json.loads(line[5:])


def _bytes(name: str, text: str) -> Any:
    import numpy as np
    from tritonclient.grpc import InferInput

    given = InferInput(name, [1], "BYTES")
    given.set_data_from_numpy(np.array([text.encode()], dtype=object))
    return given


def _bool(name: str, value: bool) -> Any:
    import numpy as np
    from tritonclient.grpc import InferInput

    given = InferInput(name, [1], "BOOL")
    given.set_data_from_numpy(np.array([value]))
    return given


def _reason(values: Any) -> str | None:
    """vLLM's backend says "None" before the end."""
    value = values[0] if values is not None and len(values) else None
    text = value.decode() if isinstance(value, bytes) else value
    return None if text in (None, "", "None") else str(text)


def _number(values: Any) -> int:
    return int(values[0]) if values is not None and len(values) else 0
