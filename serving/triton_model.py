"""`model.py` of the Triton model `gemma`: the inputs and outputs of NVIDIA's vLLM backend in front of the engine.

It is copied into the repository beside `protocol.py` and runs in Triton's Python stub, a process that has neither torch
nor weights: requests go to the engine over a Unix socket, and what it says goes back to whom it belongs. So this
process may die and the weights stay loaded; and where the engine dies, everybody who waits is told so at once.

Two threads: Triton's own calls `execute`; the other hears the engine, answers, notices clients that have left, and
touches `gemma.beat`, by which the supervisor sees that it lives. The working directory is its state folder.

As in NVIDIA's backend, parts of a stream are what is new since the last one, `stream` = false makes one response that
begins with the prompt unless `exclude_input_in_output`, and parameters come as `sampling_parameters` or as parameters
of the request. Unlike there, a parameter that is unknown or out of range is an error. An error's text begins with its
code (`protocol.CODES`).
"""

import contextlib
import itertools
import json
import locale
import logging
import logging.handlers
import os
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).resolve().parent))
import protocol

ENGINE = "engine.sock"
STATUS = "status.json"  # written by the supervisor
LOG = "requests.jsonl"
LOG_BYTES, LOG_FILES = 10 << 20, 3
WRITE_SECONDS = 20.0  # that a busy engine has to take a line; one that hangs is ended before, which ends the wait
TICK = 0.05  # seconds between two looks for clients that have left
READ_BYTES = 1 << 14  # of the engine at once: some hundred parts of streams, between two looks
PATIENCE = 0.25  # seconds between two attempts to reach the engine
TO_RETURN = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
REFUSED = ("return_cumulative_logprob", "return_logprobs")


@dataclass
class Waiting:
    """A request that has no final response yet."""

    sender: Any
    client_id: str
    adapter: str
    stream: bool
    before: str  # the prompt, where the answer begins with it
    returns: tuple[str, ...]
    prompt: str
    begun: float = field(default_factory=time.monotonic)
    tokens: int = 0  # that the client has been given
    sent: bool = False
    cancelled: bool = False  # and the engine knows
    text: list[str] = field(default_factory=list)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        locale.setlocale(locale.LC_ALL, "C.UTF-8")  # the stub's default is ASCII
        self.name, self.parent = args["model_name"], os.getppid()
        _protect_shared_memory()
        self.waiting: dict[int, Waiting] = {}
        self.lock = threading.Lock()  # of `waiting` and `engine`
        self.writing = threading.Lock()  # to the engine, which may let a writer wait
        self.ids = itertools.count(1)
        self.closing = False
        self.log = _request_log()
        self.metrics = Metrics(self.name)
        self.log_text = os.environ.get("SERVING_LOG_TEXT") == "1"
        # Until the engine answers this model is loading, and Triton says "not ready".
        self.engine: socket.socket | None = self._reach_engine()
        self.thread = threading.Thread(target=self._hear_engine, daemon=True)
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
            except UnicodeDecodeError as error:  # in the name or text of a parameter of the request
                self._refuse(given, f"a parameter is not UTF-8: {error.reason}", protocol.INVALID)
            except Exception as error:  # a request must not take the others with it
                self._refuse(given, f"{type(error).__name__}: {error}", protocol.INTERNAL)

    def _read(self, request: Any, given: Waiting) -> tuple[protocol.Generate, Waiting]:
        """
        Raises:
            RequestError: what is wrong with the request.
        """
        prompt = protocol.check_prompt(_text(request, "text_input") or "")
        parameters = _text(request, "sampling_parameters")
        sampling, lora_name = protocol.read_sampling(request.parameters() if parameters is None else parameters)
        given.adapter, given.prompt = lora_name or "", prompt
        given.stream = _flag(request, "stream") or False
        excludes = _flag(request, "exclude_input_in_output")
        if given.stream and excludes is False:
            raise protocol.RequestError("exclude_input_in_output is false, which a stream does not allow")
        if not given.stream and not excludes:
            given.before = prompt
        if refused := [name for name in REFUSED if _flag(request, name)]:
            raise protocol.RequestError(f"{refused[0]} is not supported by this engine")
        given.returns = tuple(name for name in TO_RETURN if _flag(request, name))
        return protocol.Generate(next(self.ids), prompt, sampling, lora_name, given.stream), given

    def _send_to_engine(self, generate: protocol.Generate, given: Waiting) -> None:
        with self.lock:
            if self.engine is None:
                raise protocol.RequestError("the engine has ended and is being started again", protocol.UNAVAILABLE)
            self.waiting[generate.id] = given
        try:
            with self.writing:
                self._write(protocol.encode(generate.as_json()))
            given.sent = True
        except OSError:
            with self.lock:
                unanswered = self.waiting.pop(generate.id, None)
            if unanswered:  # else the other thread has answered it
                raise protocol.RequestError("the engine has ended", protocol.UNAVAILABLE) from None

    def _write(self, line: bytes) -> None:
        """
        Raises:
            OSError: the engine has not taken it. Half a line may have gone, so nothing more goes this way.
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

    # --- the thread that hears the engine -----------------------------------------------------------------------------

    def _reach_engine(self) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(ENGINE)
                return connection
            except OSError:
                connection.close()
                self._live()
                time.sleep(PATIENCE)

    def _hear_engine(self) -> None:
        assert self.engine
        self.engine.settimeout(WRITE_SECONDS)
        heard, look_at, beat_at = b"", 0.0, 0.0
        while not self.closing:
            try:
                if select.select([self.engine], [], [], TICK)[0]:
                    part = self.engine.recv(READ_BYTES)
                    if not part:
                        break
                    *lines, heard = (heard + part).split(b"\n")
                    for line in lines:
                        self._take_safely(line)
            except OSError:
                break
            now = time.monotonic()
            if now >= look_at:
                self._look_for_leavers()
                look_at = now + TICK
            if now >= beat_at:
                self._live()
                beat_at = now + protocol.BEAT_SECONDS
        with self.lock:
            self.engine.close()
            self.engine = None
            left, self.waiting = self.waiting, {}
        for given in left.values():
            self._refuse(given, "the engine has ended", protocol.UNAVAILABLE)
        if not self.closing:
            pb_utils.unload_model(self.name)  # not ready from now on; `adapters` loads it again

    def _live(self) -> None:
        """Tell the supervisor; and end with Triton, whose orphan would hold its shared memory."""
        if os.getppid() != self.parent:
            os._exit(1)
        Path(f"{self.name}.beat").touch()

    def _look_for_leavers(self) -> None:
        with self.lock:
            left = [number for number, given in self.waiting.items() if not given.cancelled]
        for number in left:
            given = self.waiting.get(number)
            if given and given.sent and given.sender.is_cancelled():
                given.cancelled = self._tell_to_cancel(number)

    def _tell_to_cancel(self, number: int) -> bool:
        """Whether the engine has been told. This thread answers everybody, so it does not wait for an engine's ear."""
        assert self.engine
        if not select.select([], [self.engine], [], 0)[1] or not self.writing.acquire(blocking=False):
            return False
        try:
            self._write(protocol.encode({"op": "cancel", "id": number}))
        except OSError:
            return False  # it is gone, as the next look at the socket shows
        finally:
            self.writing.release()
        return True

    def _take_safely(self, line: bytes) -> None:
        try:
            self._take(protocol.decode(line))
        except Exception as error:  # one answer that could not be given is not the end of the others
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")

    def _take(self, message: dict[str, Any]) -> None:
        if "beat" in message:
            return self.metrics.show(message["beat"])
        if "id" not in message:
            return None
        answer = protocol.read_answer(message)
        if isinstance(answer, protocol.Part):
            given = self.waiting.get(answer.id or 0)
            if given and not given.cancelled:
                self._respond(given, answer.text, answer.tokens, None)
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
            self._respond(given, given.before + answer.text, answer.output_tokens, answer)
            self.metrics.count(given.adapter, answer.finish_reason, answer)
            self._note(given, answer.finish_reason, answer)

    # --- responses ----------------------------------------------------------------------------------------------------

    def _respond(self, given: Waiting, text: str, tokens: int, done: "protocol.Done | None") -> None:
        values: dict[str, np.ndarray] = {"text_output": np.array([text.encode()], dtype=np.object_)}
        if "return_finish_reason" in given.returns:
            values["finish_reason"] = np.array([str(done and done.finish_reason).encode()], dtype=np.object_)
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
        self.metrics.count(adapter, code)  # whose names are a client's own would fill memory
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


class Metrics:
    """What `/metrics` shows beside Triton's own figures; counted since this process began."""

    def __init__(self, model: str) -> None:
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        names = {
            "requests": (counter, "Requests by adapter and outcome: stop, length, cancelled, or an error's code"),
            "tokens": (counter, "Generated tokens by adapter"),
            "prompt_tokens": (counter, "Tokens of prompts by adapter"),
            "ttft_seconds_sum": (counter, "Seconds from a request's arrival to its first token, added up, by adapter"),
            "ttft_seconds_count": (counter, "Requests in gemma_ttft_seconds_sum, by adapter"),
            "running": (gauge, "Requests that the engine generates for"),
            "queued": (gauge, "Requests that wait for a place in the engine"),
            "kv_cache_tokens": (gauge, "Tokens in the engine's key-value cache"),
            "restarts": (counter, "Parts that the supervisor has started again, by part"),
        }
        self.families = {
            name: pb_utils.MetricFamily(name=f"{model}_{name}", description=about, kind=kind)
            for name, (kind, about) in names.items()
        }
        # One thread at a time: a Metric has one place in shared memory for what it asks of Triton, which follows the
        # addresses that it finds there. Two threads at once ended Triton with SIGSEGV, once in some thousand requests.
        self.lock = threading.Lock()
        self.metrics: dict[tuple[str, ...], Any] = {}
        self.shown: dict[str, float] = {}
        status = Path(STATUS)
        restarts = json.loads(status.read_text())["restarts"] if status.exists() else {}
        for part, times in restarts.items():
            counted = self._of("restarts", part=part)
            counted.increment(times - counted.value())  # Triton may have kept it from the stub before

    def count(self, adapter: str, outcome: str, done: "protocol.Done | None" = None) -> None:
        with self.lock:
            self._of("requests", adapter=adapter, outcome=outcome).increment(1)
            if done:
                self._of("tokens", adapter=adapter).increment(done.output_tokens)
                self._of("prompt_tokens", adapter=adapter).increment(done.input_tokens)
                self._of("ttft_seconds_sum", adapter=adapter).increment(done.ttft)
                self._of("ttft_seconds_count", adapter=adapter).increment(1)

    def show(self, beat: dict[str, Any]) -> None:
        with self.lock:
            for name, key in (("running", "running"), ("queued", "waiting"), ("kv_cache_tokens", "kv_tokens")):
                if self.shown.get(name) != beat[key]:
                    self._of(name).set(beat[key])
                    self.shown[name] = beat[key]

    def _of(self, name: str, **labels: str) -> Any:
        key = (name, *labels.values())
        if key not in self.metrics:
            self.metrics[key] = self.families[name].Metric(labels=labels)
        return self.metrics[key]


def _text(request: Any, name: str) -> str | None:
    """
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


def _flag(request: Any, name: str) -> bool | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else bool(tensor.as_numpy().reshape(-1)[0])


def _triton_code(code: str) -> int:
    codes = pb_utils.TritonError  # is there only once Triton has read this file
    return {
        protocol.INVALID: codes.INVALID_ARG,
        protocol.BUSY: codes.UNAVAILABLE,
        protocol.UNAVAILABLE: codes.UNAVAILABLE,
        protocol.UNKNOWN_ADAPTER: codes.NOT_FOUND,
        protocol.CANCELLED: codes.CANCELLED,
    }.get(code, codes.INTERNAL)


def _protect_shared_memory() -> None:
    """Take the region that requests and answers pass through from other users: Triton makes it readable by everybody.

    Its name is the second argument of this process. A umask does not help, as Triton sets the mode itself.
    """
    region = Path("/proc/self/cmdline").read_bytes().split(b"\0")[2].decode()
    Path("/dev/shm", region).chmod(0o600)


def _request_log() -> logging.Logger:
    handler = logging.handlers.RotatingFileHandler(LOG, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("requests")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    return log
