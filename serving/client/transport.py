"""One request to Triton and its streamed answer, over gRPC or HTTP.

gRPC opens a bidirectional stream for each request, many at once on one connection; ending it cancels the request in the
engine. HTTP posts to `/generate_stream` and reads server-sent events, because tritonclient's own HTTP client expects
exactly one response to a request. Both use the inputs and outputs of NVIDIA's vLLM backend.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from .adapter import TokenLogprob
from .errors import Busy, DeadlineExceeded, InvalidRequest, ServingError, Unavailable, error_of

MODEL, CATALOGUE = "gemma", "adapters"
# Inputs of every request, beside its text and sampling parameters.
FLAGS = {
    "stream": True,
    "exclude_input_in_output": True,
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
}
CONNECT_SECONDS = 5.0  # a host that does not exist never answers
LARGEST = 64 << 20  # bytes of a message; the server's own limits are lower


class AnswerChunk(NamedTuple):
    """A piece of a streamed answer.

    Attributes:
        finish_reason: why the model ended, in the last chunk; None before.
        input_tokens: of the whole prompt, in the last chunk; 0 before.
        output_tokens: of this chunk.
        logprobs: of this chunk's tokens, where they were asked for.
    """

    text: str
    finish_reason: str | None
    input_tokens: int
    output_tokens: int
    logprobs: list[list[TokenLogprob]]


class Transport(Protocol):
    """One connection to a server, for any number of concurrent requests in one event loop."""

    def stream(
        self, text: str | Sequence[int], sampling: str, logprobs: bool = False
    ) -> AsyncGenerator[AnswerChunk, None]:
        """The answer to one request. Closing the iterator early cancels the request in the engine.

        Args:
            text: the whole prompt, or its tokens, which NVIDIA's vLLM backend does not take.
            sampling: vLLM's sampling parameters as JSON.
            logprobs: return those that they ask for.

        Raises:
            ServingError: the subclass tells the kind of failure; never an exception of grpc or httpx.
        """

    async def catalogue(self, name: str, output: str = "catalogue") -> str:
        """The served adapters as a JSON list; only one of them where `name` is not "".

        Args:
            output: "engine": what the engine said of itself last, as a JSON object; {} from one that says nothing.
        """

    async def ready(self) -> bool:
        """Whether the server reports the model ready."""

    async def close(self) -> None: ...


def connect(url: str, headers: Mapping[str, str], ca_file: Path | None) -> Transport:
    """A connection to `url` (HOST:PORT, grpc://, grpcs://, http:// or https://), opened when it is first needed.

    Raises:
        InvalidRequest: the URL is not valid, or the CA file does not exist.
    """
    scheme, rest = url.split("://", 1) if "://" in url else ("grpc", url)
    try:
        parts = urlsplit(f"//{rest}")
        known = scheme in ("grpc", "grpcs", "http", "https") and parts.hostname and parts.port
    except ValueError:
        known = None
    if not known:
        raise InvalidRequest(
            f"'{url}' is not a server's address: give HOST:PORT, as in 127.0.0.1:8001, or grpcs://… "
            f"for gRPC, http://127.0.0.1:9000 or https://… for HTTP"
        )
    if ca_file is not None and not ca_file.is_file():
        raise InvalidRequest(f"the CA file {ca_file} does not exist")
    if scheme.startswith("grpc"):
        return Grpc(rest.rstrip("/"), scheme == "grpcs", headers, ca_file)
    return Http(f"{scheme}://{rest}".rstrip("/"), headers, ca_file)


class Grpc:
    """tritonclient's asynchronous gRPC client."""

    def __init__(self, address: str, secure: bool, headers: Mapping[str, str], ca_file: Path | None) -> None:
        import tritonclient.grpc.aio  # noqa: F401  (slow; it must not count towards the first answer's deadline)

        self._where, self._secure, self._ca_file = address, secure, ca_file
        self._headers = {name.lower(): value for name, value in headers.items()}  # gRPC takes lower case only

    @cached_property
    def _client(self) -> Any:
        from tritonclient.grpc import aio

        options = [
            ("grpc.max_send_message_length", LARGEST),
            ("grpc.max_receive_message_length", LARGEST),
            # Reconnect soon after a restart of the server; gRPC would wait up to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", int(CONNECT_SECONDS * 1000)),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        return aio.InferenceServerClient(
            self._where, ssl=self._secure, root_certificates=self._ca_file and str(self._ca_file), channel_args=options
        )

    async def stream(
        self, text: str | Sequence[int], sampling: str, logprobs: bool = False
    ) -> AsyncGenerator[AnswerChunk, None]:
        prompt = [_bytes("text_input", text)] if isinstance(text, str) else _token_inputs(text)
        inputs = [*prompt, _bytes("sampling_parameters", sampling)]
        inputs += [_bool(name, value) for name, value in {**FLAGS, "return_logprobs": logprobs}.items()]

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": MODEL, "inputs": inputs}

        responses = self._client.stream_infer(requests(), headers=self._headers)
        try:
            async for result, error in responses:
                if error is not None:
                    raise error_of(error.message(), self._where)
                yield AnswerChunk(
                    b"".join(result.as_numpy("text_output")).decode(errors="replace"),
                    _reason(result.as_numpy("finish_reason")),
                    int(_number(result.as_numpy("num_input_tokens"))),
                    int(_number(result.as_numpy("num_output_tokens"))),
                    _logprobs(result.as_numpy("logprobs")),
                )
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            # gRPC raises this for a channel that was closed.
            raise ServingError(f"this client of {self._where} was closed before the answer was complete") from None
        except Exception as error:
            raise await self._reason_of_the_end(error) from None
        finally:
            responses.cancel()

    async def _reason_of_the_end(self, error: Exception) -> Exception:
        """The exception to raise for `error`, which ended a stream.

        A server that refuses a call by its headers may end it before the question is sent. gRPC's asyncio client
        (1.85.1; grpc/grpc issue 36066) then loses the server's reason and reports its own failure to send. A call
        that sends and receives in one batch, as one without a stream does, keeps the reason.
        """
        import grpc

        if not (isinstance(error, grpc.RpcError) and error.details() == "Internal error from Core"):
            return self._translated(error)
        try:
            await self.ready()
        except Exception as reason:
            return reason
        return Unavailable(f"{self._where} ended the call before the question was sent")

    async def catalogue(self, name: str, output: str = "catalogue") -> str:
        try:
            result = await self._client.infer(CATALOGUE, [_bytes("name", name)], headers=self._headers)
        except Exception as error:
            raise self._translated(error) from None
        value = result.as_numpy(output)
        return "{}" if value is None else bytes(value[0]).decode()

    async def ready(self) -> bool:
        try:
            return bool(await self._client.is_model_ready(MODEL, headers=self._headers))
        except Exception as error:
            raise self._translated(error) from None

    async def close(self) -> None:
        if "_client" in vars(self):
            await self._client.close()

    def _translated(self, error: Exception) -> Exception:
        """The exception to raise for `error`, which comes from gRPC, from tritonclient or from this file."""
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
                f"nothing answers at {where} ({text}); start one with make serve, or give another address"
            )
        if status in ("UNAVAILABLE", "CANCELLED"):
            return Unavailable(f"{where}: {text}")
        if status == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{where}: {text}")
        if status == "RESOURCE_EXHAUSTED":
            return (InvalidRequest if "larger than max" in text else Busy)(f"{where}: {text}")
        if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return InvalidRequest(f"{where} refuses this client ({text}); pass the credentials it asks for in headers")
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
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # AsyncClient limits how long an answer may take
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def stream(
        self, text: str | Sequence[int], sampling: str, logprobs: bool = False
    ) -> AsyncGenerator[AnswerChunk, None]:
        prompt = {"text_input": text} if isinstance(text, str) else {"text_input": "", "prompt_token_ids": [*text]}
        body = {**prompt, "sampling_parameters": sampling, **FLAGS, "return_logprobs": logprobs}
        try:
            async with self._client.stream("POST", f"/v2/models/{MODEL}/generate_stream", json=body) as response:
                if response.status_code != 200:
                    raise self._refused(response.status_code, await response.aread())
                async for event in _events(response.aiter_bytes()):
                    if "error" in event:
                        raise error_of(event["error"], self._where)
                    yield AnswerChunk(
                        event.get("text_output", ""),
                        _reason([event.get("finish_reason")]),
                        int(event.get("num_input_tokens", 0)),
                        int(event.get("num_output_tokens", 0)),
                        _logprobs([event.get("logprobs")]),
                    )
        except Exception as error:
            raise self._translated(error) from None

    async def catalogue(self, name: str, output: str = "catalogue") -> str:
        try:
            response = await self._client.post(f"/v2/models/{CATALOGUE}/generate", json={"name": name})
        except Exception as error:
            raise self._translated(error) from None
        if response.status_code != 200:
            raise self._refused(response.status_code, response.content)
        return str(response.json().get(output, "{}"))

    async def ready(self) -> bool:
        try:
            response = await self._client.get(f"/v2/models/{MODEL}/ready")
            return bool(response.status_code == 200)
        except Exception as error:
            raise self._translated(error) from None

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
            return InvalidRequest(
                f"{self._where} refuses this client ({text}); pass the credentials it asks for in headers"
            )
        if status == 429:
            return Busy(str(found))
        if status in (502, 503, 504):
            return Unavailable(str(found))
        return InvalidRequest(str(found)) if 400 <= status < 500 else found

    def _translated(self, error: Exception) -> Exception:
        import httpx

        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return Unavailable(
                f"nothing answers at {self._where} ({error}); start one with make serve, or give another address"
            )
        if isinstance(error, httpx.HTTPError):
            return Unavailable(f"{self._where}: the connection was lost ({error or type(error).__name__})")
        return error


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of server-sent events. Only line feeds end a line: texts may contain Unicode's other separators."""
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


def _token_inputs(tokens: Sequence[int]) -> list[Any]:
    import numpy as np
    from tritonclient.grpc import InferInput

    given = InferInput("prompt_token_ids", [len(tokens)], "INT32")
    given.set_data_from_numpy(np.array(tokens, dtype=np.int32))
    return [_bytes("text_input", ""), given]


def _bool(name: str, value: bool) -> Any:
    import numpy as np
    from tritonclient.grpc import InferInput

    given = InferInput(name, [1], "BOOL")
    given.set_data_from_numpy(np.array([value]))
    return given


def _reason(values: Any) -> str | None:
    """The finish reason; vLLM's backend sends the text "None" before the end."""
    value = values[0] if values is not None and len(values) else None
    text = value.decode() if isinstance(value, bytes) else value
    return None if text in (None, "", "None") else str(text)


def _logprobs(values: Any) -> list[list[TokenLogprob]]:
    """Of each token of a chunk: JSON, in which vLLM's backend has an object of tokens for each."""
    if values is None or not len(values) or values[0] is None:
        return []
    return [[_logprob(int(token), about) for token, about in tokens.items()] for tokens in json.loads(values[0]) or []]


def _logprob(token: int, about: Mapping[str, Any]) -> TokenLogprob:
    text = about.get("decoded_token") or ""
    # A token that is a part of a character is decoded to the replacement character.
    of_text = None if "\N{REPLACEMENT CHARACTER}" in text else text.encode()
    return TokenLogprob(
        token, text, about["logprob"], about["rank"], bytes(about["bytes"]) if "bytes" in about else of_text
    )


def _number(values: Any) -> int:
    return int(values[0]) if values is not None and len(values) else 0
