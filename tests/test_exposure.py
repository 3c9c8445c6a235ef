"""A server that lets other machines in: what they reach, and what of their requests reaches Triton's HTTP.

127.0.0.2 stands for another machine's way in: what listens on 127.0.0.1 alone is not heard there.
"""

import gzip
import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import PATIENCE, until
from test_gateway import Gateway, gateway
from tiny_serving import ENDLESS, GREEDY, WINDOW, Stack, is_open, needs_serving, serve_tiny

from serving.client import Client, InvalidRequest
from serving.server_options import LOOPBACK, ServerOptions

OUTSIDE = "127.0.0.2"
KEY = {"authorization": "Bearer right"}
HI: dict[str, Any] = {"text_input": "Hello there", "parameters": GREEDY}
ENDLESS_STREAM = {"text_input": "Hi", "stream": True, "parameters": {**ENDLESS, "max_tokens": 3 * WINDOW}}
GENERATE = "/v2/models/gemma/generate"
STREAM = "/v2/models/gemma/generate_stream"


@pytest.fixture(scope="module")
def stack(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    environment = pytest.MonkeyPatch()
    environment.setenv("SERVING_API_KEY", "right")
    with serve_tiny(
        tiny_base, tmp_path_factory.mktemp("exposed"), "host=0.0.0.0", "expose=grpc", window=4 * WINDOW
    ) as running:
        environment.undo()  # other gateways of this module ask for none
        yield running


@pytest.fixture
def outside(stack: Stack) -> Iterator[httpx.Client]:
    """A client of the gateway on another machine, with a key."""
    with httpx.Client(base_url=f"http://{OUTSIDE}:{stack.ports['gateway']}", headers=KEY, timeout=PATIENCE) as client:
        yield client


def test_beyond_this_machine_only_the_gateway_is_heard_unless_more_is_asked_for(tmp_path: Path) -> None:
    def heard(*expose: str, host: str = "0.0.0.0") -> list[str]:
        listening = ServerOptions(tmp_path, host, expose=expose).listening
        return [name for name, (address, _) in listening.items() if address != LOOPBACK]

    assert heard() == heard(host="192.0.2.7") == ["gateway"]
    assert heard("grpc") == ["grpc", "gateway"] and heard("http", "grpc") == ["http", "grpc", "gateway"]
    assert ServerOptions(tmp_path, "192.0.2.7", expose=("grpc",)).from_here("grpc") == "192.0.2.7:8001"


def test_other_machines_reach_the_gateway_and_what_was_exposed_alone(stack: Stack) -> None:
    assert {name for name, port in stack.ports.items() if is_open(port, OUTSIDE)} == {"gateway", "grpc"}
    assert all(is_open(port) for port in stack.ports.values())
    with Client(f"{OUTSIDE}:{stack.ports['grpc']}") as client:
        assert [adapter.name for adapter in client.adapters()] == ["chat", "slang", "squid_game"]


def test_tritons_endpoints_answer_through_the_gateway_as_they_do_here(stack: Stack, outside: httpx.Client) -> None:
    body = HI | {"parameters": GREEDY | {"lora_name": "slang"}}
    for path, asked in ((GENERATE, body), (STREAM, body | {"stream": True}), (GENERATE, body | {"stream": True})):
        here, there = (httpx.post(f"{stack.http}{path}", json=asked, timeout=PATIENCE), outside.post(path, json=asked))
        assert (there.status_code, there.text) == (here.status_code, here.text)
        assert there.headers["content-type"].partition(";")[0] == here.headers["content-type"].partition(";")[0]
    assert outside.post(STREAM, json=body).headers["x-accel-buffering"] == "no"
    wrong = outside.post(GENERATE, json=HI | {"parameters": {"temperature": -1}})
    assert wrong.status_code == 400 and "temperature is -1" in wrong.json()["error"]
    for path in ("/v2", "/v2/health/ready", "/v2/models/gemma", "/v2/models/gemma/config", "/v2/models/gemma/ready"):
        assert outside.get(path).text == httpx.get(f"{stack.http}{path}", timeout=PATIENCE).text
    counted = outside.get("/metrics").text
    assert f'door_requests_total{{model="",path="{GENERATE}",status="400"}}' in counted
    figures = outside.get("/triton/metrics").text
    assert "nv_inference_count" in figures and "gemma_requests" in figures


def test_the_client_speaks_http_through_the_gateway(stack: Stack) -> None:
    url = f"http://{OUTSIDE}:{stack.ports['gateway']}"
    with Client(url, headers=KEY) as client, Client(stack.grpc) as here:
        assert client.is_ready() and client.adapters() == here.adapters()
        assert client.generate("Hi", "slang", **GREEDY) == here.generate("Hi", "slang", **GREEDY)
    with Client(url) as stranger, pytest.raises(InvalidRequest, match="the API key is missing or wrong"):
        stranger.generate("Hi", **GREEDY)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/gemma/unload"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/systemsharedmemory/region/x/register"),
        ("GET", "/v2/logging"),
        ("GET", "/v2/trace/setting"),
        ("GET", "/v2/models/gemma/trace/setting"),
        ("POST", "/v2/models/gemma/infer"),
        ("POST", "/v2/models/nobody/generate"),
        ("POST", "/v2/models/gemma/versions/99/generate"),
        ("POST", "/v2/models/gemma/../gemma/generate"),
        ("GET", GENERATE),
    ],
)
def test_nothing_else_of_triton_is_passed_on(stack: Stack, method: str, path: str) -> None:
    with socket.create_connection((OUTSIDE, stack.ports["gateway"]), PATIENCE) as connection:  # as it is written
        connection.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\nContent-Length: 2\r\n"
            "Connection: close\r\n\r\n{}".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    assert answer.startswith("HTTP/1.1 404") and "is not passed on to Triton" in answer


def nested(depth: int) -> bytes:
    return b'{"text_input": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b'{"text_input": "\\ud800"}', 400),
        (b'{"text_input": NaN}', 400),
        (b'{"text_input": 1e999}', 400),
        (nested(100_000), 400),
        (gzip.compress(json.dumps(HI).encode()), 400),
        (b"x" * ((1 << 20) + 1), 413),
        (iter([b"x" * (1 << 19)] * 3), 413),
    ],
    ids=[
        "nothing",
        "half",
        "a list",
        "no text",
        "half a letter",
        "NaN",
        "infinity",
        "deep",
        "packed",
        "large",
        "chunks",
    ],
)
def test_a_body_that_is_no_plain_json_object_stays_at_the_gateway(
    outside: httpx.Client, content: Any, status: int
) -> None:
    refused = outside.post(GENERATE, content=content, headers={"content-encoding": "identity"})
    assert refused.status_code == status
    assert refused.json()["error"].startswith("invalid: the body is not" if status == 400 else "the request is larger")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_token_ids", [2, 1.5]),
        ("prompt_token_ids", [(1 << 32) + 2]),
        ("prompt_token_ids", [[2]]),
        ("prompt_token_ids", [True]),
        ("prompt_token_ids", None),
        ("return_logprobs", 1),
        ("stream", "yes"),
        ("text_input", 5),
        ("sampling_parameters", {"max_tokens": 3}),
    ],
)
def test_an_input_of_a_wrong_type_is_refused_by_name(outside: httpx.Client, name: str, value: Any) -> None:
    refused = outside.post(GENERATE, json={"text_input": "", name: value})
    assert refused.status_code == 400 and refused.json()["error"].startswith(f"invalid: {name} is not ")


def test_an_input_may_be_a_list_of_one(outside: httpx.Client) -> None:
    lists = {"text_input": ["Hi"], "stream": [False], "sampling_parameters": [json.dumps(GREEDY)]}
    one, other = (outside.post(GENERATE, json=body) for body in (lists, {"text_input": "Hi", **GREEDY}))
    assert one.status_code == 200 and one.json()["text_output"] == other.json()["text_output"]


def test_a_key_is_asked_for_but_not_by_health(stack: Stack, outside: httpx.Client) -> None:
    url = f"http://{OUTSIDE}:{stack.ports['gateway']}"
    for path in (GENERATE, STREAM):
        refused = httpx.post(f"{url}{path}", json=HI, timeout=PATIENCE)
        assert refused.status_code == 401 and "the API key is missing or wrong" in refused.json()["error"]
    assert httpx.get(f"{url}/v2/models/gemma/config", timeout=PATIENCE).status_code == 401
    assert httpx.get(f"{url}/v2/health/live", timeout=PATIENCE).status_code == 200


def test_who_leaves_a_stream_ends_its_generation(stack: Stack, outside: httpx.Client) -> None:
    before = stack.cancelled()
    with outside.stream("POST", STREAM, json=ENDLESS_STREAM) as response:
        parts = response.iter_bytes()  # httpx closes the connection with the iterator
        assert next(parts), "the answer has begun"
        until(lambda: stack.stats()["running"] == 1)
    until(lambda: stack.cancelled() > before and not stack.stats()["running"])
    assert stack.cancelled() == before + 1, "by the client's leaving, long before its end"


@pytest.mark.slow
@needs_serving
def test_nothing_that_a_client_wrote_reaches_triton_but_its_json(tmp_path: Path) -> None:
    """A listener in Triton's place shows the bytes."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.settimeout(PATIENCE)
        triton = f"http://{LOOPBACK}:{listener.getsockname()[1]}"
        seen: list[bytes] = []

        def listen() -> None:
            connection, _ = listener.accept()
            with connection:
                seen.append(connection.recv(1 << 16))
                while not seen[0].endswith(b"}"):
                    seen[0] += connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=listen)
        thread.start()
        with gateway("127.0.0.1:9", tmp_path / "log", "--triton-http", triton) as checking:
            pieces = [b'{"text_input"  :', b' "\\u00e9", ', b'"text_input": "last"}']
            headers = {"X-Forwarded-Host": "x", "Inference-Header-Content-Length": "9", "Cookie": "a=b", "Expect": ""}
            answer = httpx.post(f"{checking.url}{GENERATE}?a=b", content=iter(pieces), headers=headers)
        thread.join()
    assert answer.json() == {}
    head, _, body = seen[0].partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    sent = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert (first, body) == (f"POST {GENERATE} HTTP/1.1", b'{"text_input": "last"}')
    assert sent.pop("content-length") == str(len(body)) and sent.pop("host") in triton
    assert sent.keys() == {"accept", "accept-encoding", "connection", "content-type", "user-agent"}


PAGE, OTHER = "https://app.example.org", "https://elsewhere.example.org"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that knows no HTTP of Triton, and one web page."""
    with gateway(
        "127.0.0.1:9", tmp_path_factory.mktemp("alone") / "log", "--allow-origin", f"{PAGE.upper()}:443"
    ) as running:
        yield running


def test_a_gateway_without_tritons_http_says_which_way_to_take(alone: Gateway) -> None:
    refused = httpx.post(f"{alone.url}{GENERATE}", json=HI, timeout=PATIENCE)
    assert refused.status_code == 404 and "use /v1" in refused.json()["error"]
    assert httpx.get(f"{alone.url}/triton/metrics", timeout=PATIENCE).status_code == 404


def test_web_pages_of_named_origins_may_call(alone: Gateway, stack: Stack) -> None:
    def allowed(url: str, origin: str) -> tuple[str | None, str | None]:
        """Which origin may send, and may read what comes back."""
        url, known = f"{url}/v1/chat/completions", {"origin": origin}
        wants = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        before = httpx.options(url, headers=known | wants, timeout=PATIENCE)
        after = httpx.post(url, headers=known | KEY, content=b"{", timeout=PATIENCE)
        assert after.status_code == 400
        name = "access-control-allow-origin"
        return before.headers.get(name), after.headers.get(name)

    assert allowed(alone.url, PAGE) == (PAGE, PAGE)
    assert allowed(alone.url, OTHER) == allowed(stack.gateway, PAGE) == (None, None)


@pytest.mark.slow
def test_a_stream_through_the_gateway_that_is_cut_off_by_a_stop_is_told(stack: Stack, tmp_path: Path) -> None:
    triton = ("--triton-http", stack.http)
    with (
        gateway(stack.grpc, tmp_path / "log", *triton) as stopped,
        httpx.stream("POST", f"{stopped.url}{STREAM}", json=ENDLESS_STREAM, timeout=PATIENCE) as response,
    ):
        parts = response.iter_text()
        next(parts)
        stopped.process.send_signal(signal.SIGTERM)
        text = "".join(parts)
    assert text.endswith(
        'data: {"error": "unavailable: the server was stopped before the answer was complete; ask again"}\n\n'
    )
    until(lambda: not stack.stats()["running"])
