"""`model.py` of the Triton model `gemma`: the inputs and outputs of NVIDIA's vLLM backend in front of the engine.

It is copied into the model repository, with `serving/protocol.py` beside it, and runs in Triton's Python stub, a
process with neither torch nor weights: it forwards requests to the engine over a Unix socket and returns the engine's
answers to their clients. So the weights stay loaded when this process dies; and when the engine dies, every waiting
client gets an error at once.

There are two threads. Triton's own calls `execute`. The other receives from the engine, answers, notices clients that
have left, and touches `gemma.heartbeat`, by which the supervisor sees that it is alive. The working directory is the
server's state folder.

As in NVIDIA's backend, each response of a stream carries only new text; `stream` = false makes one response, which
begins with the prompt unless `exclude_input_in_output`; and parameters come as `sampling_parameters` or as
parameters of the request. Unlike there, an unknown or out-of-range parameter is an error. An error's text begins with
its code (`protocol.CODES`). And `prompt_token_ids`, where it is given, takes the place of an empty `text_input`.
"""

import contextlib
import itertools
import json
import locale
import os
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).resolve().parent))
from record_file import record_log

from serving import protocol

ENGINE = "engine.sock"
STATUS = "status.json"  # written by the supervisor
LOG = "requests.jsonl"
LOG_BYTES, LOG_FILES = 10 << 20, 3
WRITE_SECONDS = 20.0  # for a busy engine to read a line; one that hangs is killed earlier, which ends the wait
TICK = 0.05  # seconds between two checks for clients that have left
READ_BYTES = 1 << 14  # read from the engine at once: some hundred deltas, between two checks
RETRY_SECONDS = 0.25  # between two attempts to reach the engine
TO_RETURN = (
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)


@dataclass
class Waiting:
    """A request that has no final response yet."""

    sender: Any
    client_id: str
    adapter: str
    stream: bool
    before: str  # the prompt, where the answer has to begin with it
    returns: tuple[str, ...]
    prompt: str
    begun: float = field(default_factory=time.monotonic)
    tokens: int = 0  # sent to the client so far
    logprob: float = 0.0  # of these tokens
    sent: bool = False
    cancelled: bool = False  # the engine has been told
    text: list[str] = field(default_factory=list)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        locale.setlocale(locale.LC_ALL, "C.UTF-8")  # the stub's default is ASCII
        self.name, self.parent = args["model_name"], os.getppid()
        _protect_shared_memory()
        self.waiting: dict[int, Waiting] = {}
        self.lock = threading.Lock()  # guards `waiting` and `engine`
        self.writing = threading.Lock()  # guards the socket's sending side, on which a writer may have to wait
        self.ids = itertools.count(1)
        self.closing = False
        self.log = record_log("requests", Path(LOG), LOG_BYTES, LOG_FILES)
        self.metrics = ModelMetrics(self.name)
        self.log_text = os.environ.get("SERVING_LOG_TEXT") == "1"
        # Until the engine answers, this model is loading and Triton reports "not ready".
        self.engine: socket.socket | None = self._reach_engine()
        self.thread = threading.Thread(target=self._receive_from_engine, daemon=True)
        self.thread.start()

    def finalize(self) -> None:
        self.closing = True
        self.thread.join(5)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            given = Waiting(sender, request.request_id(), "", False, "", (), "")
            try:
                self._send_to_engine(*self._read(request, given))
            except protocol.RequestError as error:
                self._refuse(given, error.sentence, error.code)
            except UnicodeDecodeError as error:  # in the name or value of a request parameter
                self._refuse(given, f"a parameter is not UTF-8: {error.reason}", protocol.INVALID)
            except Exception as error:  # one request must not fail the others
                self._refuse(given, f"{type(error).__name__}: {error}", protocol.INTERNAL)

    def _read(self, request: Any, given: Waiting) -> tuple[protocol.Generate, Waiting]:
        """A request for the engine, made from Triton's.

        Raises:
            RequestError: something is wrong with the request.
        """
        text, tokens = _text(request, "text_input") or "", _numbers(request, "prompt_token_ids")
        if min(tokens, default=0) < 0:
            raise protocol.RequestError(f"prompt_token_ids has {min(tokens)}; tokens are whole numbers from 0")
        if text and tokens:
            raise protocol.RequestError("text_input and prompt_token_ids are two prompts; leave one empty")
        prompt = protocol.check_prompt(tokens or text)
        parameters: Any = _text(request, "sampling_parameters")
        if parameters is None:
            # Of /generate Triton passes on every field that is no input, even its own `id` of the request.
            fields = json.loads(request.parameters() or "{}")
            parameters = {name: value for name, value in fields.items() if name != "id"}
        sampling, lora_name = protocol.read_sampling(parameters)
        given.adapter, given.prompt = lora_name or "", text
        given.stream = _flag(request, "stream") or False
        excludes = _flag(request, "exclude_input_in_output")
        if given.stream and excludes is False:
            raise protocol.RequestError("exclude_input_in_output must not be false with stream")
        if not given.stream and not excludes:
            if tokens:
                raise protocol.RequestError("an answer begins with its prompt only where that is a text")
            given.before = text
        given.returns = tuple(name for name in TO_RETURN if _flag(request, name))
        if "return_cumulative_logprob" in given.returns and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)  # NVIDIA's backend says NaN, which is not JSON
        return protocol.Generate(next(self.ids), prompt, sampling, lora_name, given.stream), given

    def _send_to_engine(self, generate: protocol.Generate, given: Waiting) -> None:
        with self.lock:
            if self.engine is None:
                raise protocol.RequestError("the engine has ended and is being restarted", protocol.UNAVAILABLE)
            self.waiting[generate.id] = given
        try:
            with self.writing:
                self._write(protocol.encode(generate.as_json()))
            given.sent = True
        except OSError:
            with self.lock:
                unanswered = self.waiting.pop(generate.id, None)
            if unanswered:  # otherwise the other thread has answered it
                raise protocol.RequestError("the engine has ended", protocol.UNAVAILABLE) from None

    def _write(self, line: bytes) -> None:
        """Send one line to the engine.

        Raises:
            OSError: it could not be sent. As half of it may have been, the connection is shut down.
        """
        engine = self.engine
        if engine is None:
            raise ConnectionError
        try:
            engine.sendall(line)
        except OSError:
            with contextlib.suppress(OSError):
                engine.shutdown(socket.SHUT_RDWR)
            raise

    # --- the thread that receives from the engine ---------------------------------------------------------------------

    def _reach_engine(self) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(ENGINE)
                return connection
            except OSError:
                connection.close()
                self._heartbeat()
                time.sleep(RETRY_SECONDS)

    def _receive_from_engine(self) -> None:
        assert self.engine
        self.engine.settimeout(WRITE_SECONDS)
        received, look_at, heartbeat_at = b"", 0.0, 0.0
        while not self.closing:
            try:
                if select.select([self.engine], [], [], TICK)[0]:
                    part = self.engine.recv(READ_BYTES)
                    if not part:
                        break
                    *lines, received = (received + part).split(b"\n")
                    for line in lines:
                        self._take_safely(line)
            except OSError:
                break
            now = time.monotonic()
            if now >= look_at:
                self._look_for_leavers()
                look_at = now + TICK
            if now >= heartbeat_at:
                self._heartbeat()
                heartbeat_at = now + protocol.HEARTBEAT_SECONDS
        with self.lock:
            self.engine.close()
            self.engine = None
            left, self.waiting = self.waiting, {}
        for given in left.values():
            self._refuse(given, "the engine has ended", protocol.UNAVAILABLE)
        if not self.closing:
            pb_utils.unload_model(self.name)  # "not ready" from now on; the model `adapters` loads it again

    def _heartbeat(self) -> None:
        """Touch the heartbeat file; and exit with Triton, as an orphan would keep its shared memory."""
        if os.getppid() != self.parent:
            os._exit(1)
        with contextlib.suppress(OSError):  # no room for a new file
            Path(f"{self.name}.heartbeat").touch()

    def _look_for_leavers(self) -> None:
        with self.lock:
            left = [number for number, given in self.waiting.items() if not given.cancelled]
        for number in left:
            given = self.waiting.get(number)
            if given and given.sent and given.sender.is_cancelled():
                given.cancelled = self._tell_to_cancel(number)

    def _tell_to_cancel(self, number: int) -> bool:
        """Whether the engine was told. This thread answers all clients, so it never waits for the engine to read."""
        assert self.engine
        if not select.select([], [self.engine], [], 0)[1] or not self.writing.acquire(blocking=False):
            return False
        try:
            self._write(protocol.encode({"op": "cancel", "id": number}))
        except OSError:
            return False  # the engine is gone, as the next read will show
        finally:
            self.writing.release()
        return True

    def _take_safely(self, line: bytes) -> None:
        try:
            self._take(protocol.decode(line))
        except Exception as error:  # one answer that fails must not end the others
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")

    def _take(self, message: dict[str, Any]) -> None:
        if "heartbeat" in message:
            return self.metrics.show(message["heartbeat"])
        if "id" not in message:
            return None
        answer = protocol.read_answer(message)
        if isinstance(answer, protocol.Delta):
            given = self.waiting.get(answer.id or 0)
            if given and not given.cancelled:
                self._respond(given, answer.text, answer.tokens, answer.logprobs, None)
            return None
        with self.lock:
            given = self.waiting.pop(answer.id or 0, None)
        if given is None:
            return None
        if isinstance(answer, protocol.Failed):
            return self._refuse(given, answer.error, answer.code)
        if answer.finish_reason == protocol.CANCELLED:
            self._refuse(given, "the client has left", protocol.CANCELLED)
        else:
            self._respond(given, given.before + answer.text, answer.output_tokens, answer.logprobs, answer)
            self.metrics.count(given.adapter, answer.finish_reason, answer)
            self._note(given, answer.finish_reason, answer)

    # --- responses ----------------------------------------------------------------------------------------------------

    def _respond(
        self,
        given: Waiting,
        text: str,
        tokens: int,
        logprobs: "protocol.Logprobs | None",
        done: "protocol.Done | None",
    ) -> None:
        values: dict[str, np.ndarray] = {"text_output": np.array([text.encode()], dtype=np.object_)}
        if "return_finish_reason" in given.returns:
            values["finish_reason"] = np.array([str(done and done.finish_reason).encode()], dtype=np.object_)
        for chosen in (next(iter(token.values())) for token in logprobs or ()):
            given.logprob += chosen["logprob"]
        if "return_cumulative_logprob" in given.returns:
            values["cumulative_logprob"] = np.array([given.logprob], dtype=np.float32)
        if "return_logprobs" in given.returns:
            values["logprobs"] = np.array([json.dumps(logprobs).encode()], dtype=np.object_)
        if "return_num_input_tokens" in given.returns and done:
            values["num_input_tokens"] = np.array([done.input_tokens], dtype=np.uint32)
        if "return_num_output_tokens" in given.returns:
            values["num_output_tokens"] = np.array([tokens - given.tokens], dtype=np.uint32)
        given.tokens = tokens
        if self.log_text:
            given.text.append(text)
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in values.items()])
        given.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if done else 0)

    def _refuse(self, given: Waiting, sentence: str, code: str) -> None:
        error = pb_utils.TritonError(f"{code}: {sentence}", _triton_code(code))
        given.sender.send(pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        adapter = "" if code in (protocol.UNKNOWN_ADAPTER, protocol.INVALID) else given.adapter
        self.metrics.count(adapter, code)  # names that clients invent would fill memory
        self._note(given, code, None, sentence)

    def _note(self, given: Waiting, outcome: str, done: "protocol.Done | None", error: str | None = None) -> None:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "request": given.client_id,
            "adapter": given.adapter,
            "stream": given.stream,
            "outcome": outcome,
            "seconds": round(time.monotonic() - given.begun, 4),
        }
        if done:
            line |= {
                "input_tokens": done.input_tokens,
                "output_tokens": done.output_tokens,
                "ttft": round(done.ttft, 4),
            }
        if error:
            line["error"] = error
        if self.log_text:
            line |= {"prompt": given.prompt, "text": "".join(given.text).removeprefix(given.before)}
        self.log.info(json.dumps(line, ensure_ascii=False))


class ModelMetrics:
    """What `/metrics` shows beside Triton's own metrics, counted since this process started.

    Their names and labels are a published interface: dashboards and alerts use them.
    """

    def __init__(self, model: str) -> None:
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        names = {
            "requests": (counter, "Requests by adapter and outcome: stop, length, cancelled, or an error's code"),
            "tokens": (counter, "Generated tokens by adapter"),
            "prompt_tokens": (counter, "Tokens of prompts by adapter"),
            "ttft_seconds_sum": (counter, "Sum of the seconds from a request's arrival to its first token, by adapter"),
            "ttft_seconds_count": (counter, "Requests in gemma_ttft_seconds_sum, by adapter"),
            "running": (gauge, "Requests that the engine is generating for"),
            "queued": (gauge, "Requests that wait in the engine's queue"),
            "kv_cache_tokens": (gauge, "Tokens in the engine's key-value cache"),
            "restarts": (counter, "Restarts by the supervisor, by part: engine, triton or gateway"),
        }
        self.families = {
            name: pb_utils.MetricFamily(name=f"{model}_{name}", description=about, kind=kind)
            for name, (kind, about) in names.items()
        }
        # One thread at a time: a Metric has one slot in shared memory for its message to Triton, which follows the
        # addresses that it finds there. Two threads at once crashed Triton (SIGSEGV), once in some thousand requests.
        self.lock = threading.Lock()
        self.metrics: dict[tuple[str, ...], Any] = {}
        self.shown: dict[str, float] = {}
        status = Path(STATUS)
        restarts = json.loads(status.read_text())["restarts"] if status.exists() else {}
        for part, times in restarts.items():
            counted = self._of("restarts", part=part)
            counted.increment(times - counted.value())  # Triton may have kept it from an earlier stub

    def count(self, adapter: str, outcome: str, done: "protocol.Done | None" = None) -> None:
        with self.lock:
            self._of("requests", adapter=adapter, outcome=outcome).increment(1)
            if done:
                self._of("tokens", adapter=adapter).increment(done.output_tokens)
                self._of("prompt_tokens", adapter=adapter).increment(done.input_tokens)
                self._of("ttft_seconds_sum", adapter=adapter).increment(done.ttft)
                self._of("ttft_seconds_count", adapter=adapter).increment(1)

    def show(self, heartbeat: dict[str, Any]) -> None:
        with self.lock:
            for name, key in (("running", "running"), ("queued", "waiting"), ("kv_cache_tokens", "kv_tokens")):
                if self.shown.get(name) != heartbeat[key]:
                    self._of(name).set(heartbeat[key])
                    self.shown[name] = heartbeat[key]

    def _of(self, name: str, **labels: str) -> Any:
        key = (name, *labels.values())
        if key not in self.metrics:
            self.metrics[key] = self.families[name].Metric(labels=labels)
        return self.metrics[key]


def _text(request: Any, name: str) -> str | None:
    """The text of an optional input; None where it was not given.

    Raises:
        RequestError: it is not UTF-8.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    value = tensor.as_numpy().reshape(-1)[0]
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError as error:
        raise protocol.RequestError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _numbers(request: Any, name: str) -> tuple[int, ...]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return () if tensor is None else tuple(tensor.as_numpy().reshape(-1).tolist())


def _flag(request: Any, name: str) -> bool | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else bool(tensor.as_numpy().reshape(-1)[0])


def _triton_code(code: str) -> int:
    codes = pb_utils.TritonError  # exists only once Triton has loaded this file
    return {
        protocol.INVALID: codes.INVALID_ARG,
        protocol.BUSY: codes.UNAVAILABLE,
        protocol.UNAVAILABLE: codes.UNAVAILABLE,
        protocol.UNKNOWN_ADAPTER: codes.NOT_FOUND,
        protocol.CANCELLED: codes.CANCELLED,
    }.get(code, codes.INTERNAL)


def _protect_shared_memory() -> None:
    """Hide the shared memory of requests and answers from other users: Triton makes it readable for everybody.

    Its name is the second argument of this process. A umask does not help, as Triton sets the mode itself.
    """
    region = Path("/proc/self/cmdline").read_bytes().split(b"\0")[2].decode()
    Path("/dev/shm", region).chmod(0o600)
