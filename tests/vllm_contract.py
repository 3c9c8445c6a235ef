"""Requests as any client of NVIDIA's vLLM backend makes them, over HTTP and over gRPC; without code of ours."""

import json
import queue
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc as grpc_client
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

FLAGS = (
    "stream",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
OUTPUTS = (
    "text_output",
    "finish_reason",
    "cumulative_logprob",
    "logprobs",
    "num_input_tokens",
    "num_output_tokens",
)
PATIENCE = 300.0  # seconds; nothing may take that long


class Refused(Exception):
    """The server's error, as text."""


@dataclass(frozen=True)
class Server:
    """Addresses of a Triton that serves the model `gemma`: of ours, or of NVIDIA's with the vLLM backend."""

    http: str  # http://HOST:PORT
    grpc: str  # HOST:PORT
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=PATIENCE, limits=httpx.Limits()))

    def ask(self, protocol: str, text: str, sampling: Any = None, **fields: Any) -> list[dict[str, Any]]:
        """Every response to one request, as plain values.

        Raises:
            Refused: an error came, first or later.
        """
        return list(self.responses(protocol, text, sampling, **fields))

    def responses(self, protocol: str, text: str, sampling: Any = None, **fields: Any) -> Iterator[dict[str, Any]]:
        ask = self._over_http if protocol == "http" else self._over_grpc
        given = None if sampling is None else sampling if isinstance(sampling, str) else json.dumps(sampling)
        yield from ask(text, given, fields)

    def _over_http(self, text: str, sampling: str | None, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        body = {"text_input": text, **({} if sampling is None else {"sampling_parameters": sampling}), **fields}
        stream = bool(fields.get("stream"))
        url = f"{self.http}/v2/models/gemma/generate{'_stream' if stream else ''}"
        try:
            with self.client.stream("POST", url, json=body) as answer:
                if not stream:
                    answer.read()
                    yield self._checked(answer.json())
                    return
                for line in answer.iter_lines():
                    if line:
                        yield self._checked(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            raise Refused(f"{type(error).__name__}: {error}") from None

    @staticmethod
    def _checked(message: dict[str, Any]) -> dict[str, Any]:
        if "error" in message:
            raise Refused(message["error"])
        return message

    def _over_grpc(self, text: str, sampling: str | None, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        inputs = {
            "text_input": text.encode(),
            **({} if sampling is None else {"sampling_parameters": sampling.encode()}),
        }
        with self.grpc_stream() as (client, answers):
            with suppress(InferenceServerException):  # the stream has ended already; why, comes as an answer
                client.async_stream_infer(
                    "gemma", tensors({**inputs, **fields}), request_id="mine", enable_empty_final_response=True
                )
            while True:
                result, error = answers.get(timeout=PATIENCE)
                if error is not None:
                    raise Refused(error.message())
                response = result.get_response()
                if response.outputs:
                    assert response.id == "mine"
                    yield {name: plain(result.as_numpy(name)) for name in OUTPUTS if result.as_numpy(name) is not None}
                if response.parameters["triton_final_response"].bool_param:
                    return

    @contextmanager
    def grpc_stream(self) -> Iterator[tuple[grpc_client.InferenceServerClient, queue.Queue[Any]]]:
        """A bidirectional stream and what comes back on it: (result, error)."""
        answers: queue.Queue[Any] = queue.Queue()
        client = grpc_client.InferenceServerClient(self.grpc)
        client.start_stream(lambda result, error: answers.put((result, error)))
        try:
            yield client, answers
        finally:
            client.stop_stream(cancel_requests=True)
            client.close()

    def is_ready(self) -> bool:
        try:
            answers = [
                self.client.get(f"{self.http}/v2/{path}/ready", timeout=60) for path in ("health", "models/gemma")
            ]
        except httpx.HTTPError:
            return False
        return all(answer.status_code == 200 for answer in answers)


def tensors(values: dict[str, Any]) -> list[grpc_client.InferInput]:
    """Text and bytes as BYTES[1], flags as BOOL[1]; an array as it is."""
    found = []
    for name, value in values.items():
        if isinstance(value, str | bytes):
            value = np.array([value], dtype=np.object_)
        elif isinstance(value, bool):
            value = np.array([value])
        tensor = grpc_client.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        tensor.set_data_from_numpy(value)
        found.append(tensor)
    return found


def plain(array: np.ndarray) -> Any:
    value = array.reshape(-1)[0]
    return value.decode() if isinstance(value, bytes) else value.item()


__all__ = ["InferenceServerException", "Refused", "Server", "tensors"]
