"""Connections that would keep others out: idle, slow or many of them; on a real uvicorn, by plain sockets."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import PATIENCE, ROOT, until
from tiny_serving import SERVING_PYTHON, free_ports, is_open

LIMIT, MUCH = 10, 64 << 20  # connections; bytes
ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"GET / HT"
# /wait answers once /go was asked, /much with more than sockets hold, /refuse before it reads a body; others at once,
# with what has happened.
SITE = """
import asyncio, json, sys, uvicorn
from serving import http_connections
port, seconds = map(float, sys.argv[1:])
if seconds:
    http_connections.HEADER_SECONDS = http_connections.BODY_SECONDS = http_connections.READ_SECONDS = seconds
state, go = {"waiting": 0, "cut_off": 0}, asyncio.Event()
async def app(scope, receive, send):
    message = {"type": "http.request", "more_body": scope["path"] != "/refuse"}
    while message["type"] == "http.request" and message["more_body"]:
        message = await receive()
    state["cut_off"] += message["type"] == "http.disconnect"
    if scope["path"] == "/wait":
        state["waiting"] += 1
        await go.wait()
    if scope["path"] == "/go":
        go.set()
    body = b"x" * MUCH if scope["path"] == "/much" else json.dumps(state).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
uvicorn.run(
    app, port=int(port), http=http_connections.LimitedConnection, limit_concurrency=LIMIT, lifespan="off",
    log_level="critical", timeout_graceful_shutdown=0,
)
"""


class Site:
    def __init__(self, port: int) -> None:
        self.port = port

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        connection.sendall(sent)
        return connection

    def ask(self, source: str, path: str = "/") -> httpx.Response:
        with httpx.Client(transport=httpx.HTTPTransport(local_address=source), timeout=PATIENCE) as client:
            return client.get(f"http://127.0.0.1:{self.port}{path}")

    def count(self, what: str) -> int:
        return int(self.ask("127.0.0.3").json()[what])


@contextmanager
def serving(seconds: float) -> Iterator[Site]:
    """A site; with `seconds` that each of its limits of time then is."""
    if not SERVING_PYTHON.exists():
        pytest.skip("needs the serving environment: make serve-env")
    (port,) = free_ports(1)
    script = SITE.replace("=LIMIT", f"={LIMIT}").replace("* MUCH", f"* {MUCH}")
    process = subprocess.Popen([SERVING_PYTHON, "-c", script, str(port), str(seconds)], cwd=ROOT)
    try:
        until(lambda: is_open(port))
        yield Site(port)
    finally:
        process.kill()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving(0) as site:
        yield site


@pytest.fixture(scope="module")
def hasty() -> Iterator[Site]:
    with serving(1) as site:  # which a busy machine's client does not need for a header
        yield site


def read_answer(connection: socket.socket) -> bytes:
    """One whole answer, whose head and body may come apart."""
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(1 << 16)
        assert part, f"closed after {answer!r}"
        answer += part
    return answer


def wait_until_closed(connection: socket.socket) -> int:
    """How many bytes the server sends before it closes the connection."""
    received = 0
    try:
        while part := connection.recv(1 << 16):
            received += len(part)
    except ConnectionResetError:
        pass
    return received


def test_idle_connections_of_one_address_keep_nobody_out(site: Site) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(site.connect()) for _ in range(3 * LIMIT)]
        assert site.ask("127.0.0.2").status_code == 200
        assert site.ask("127.0.0.1").status_code == 200, "not even this address itself"
        wait_until_closed(idle[0])  # the longest idle one made room
        idle[-1].sendall(ASK)
        assert idle[-1].recv(15) == b"HTTP/1.1 200 OK", "the newest are still there"


def test_a_body_that_is_refused_by_its_header_does_not_cost_the_connection(site: Site) -> None:
    size = 1 << 20
    with site.connect(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size) as connection:
        assert read_answer(connection).startswith(b"HTTP/1.1 200 OK"), "before the body has come"
        connection.sendall(b"x" * size)
        connection.sendall(ASK)
        assert read_answer(connection).startswith(b"HTTP/1.1 200 OK")


def test_one_address_has_at_most_half_of_the_connections(site: Site) -> None:
    with ExitStack() as stack:
        for _ in range(LIMIT // 2):
            stack.enter_context(site.connect(ASK.replace(b"/", b"/wait", 1)))
        until(lambda: site.count("waiting") == LIMIT // 2)
        refused = stack.enter_context(site.connect())
        assert refused.recv(100).startswith(b"HTTP/1.1 429 Too Many Requests")
        assert site.ask("127.0.0.2", "/go").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        ASK + HALF,
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf",
    ],
    ids=["nothing", "half a header", "half a second request", "half a body"],
)
def test_a_connection_that_keeps_the_server_waiting_is_closed(hasty: Site, sent: bytes) -> None:
    before = hasty.count("cut_off")
    with hasty.connect(sent.removesuffix(HALF)) as slow:
        if sent.endswith(HALF):
            read_answer(slow)
            slow.sendall(HALF)
        assert wait_until_closed(slow) == 0, "nothing is answered to what is not complete"
    cut_off = before + (b"Content-Length" in sent)
    until(lambda: hasty.count("cut_off") >= cut_off)
    assert hasty.count("cut_off") == cut_off, "the application hears of a body that ends early, and of nothing else"


def test_a_client_that_reads_nothing_is_cut_off(hasty: Site) -> None:
    with hasty.connect(ASK.replace(b"/", b"/much", 1)) as silent:
        until(lambda: connections(hasty.port) == 0)  # it was there when `connect` returned
        assert wait_until_closed(silent) < MUCH, "the rest was not sent"


def connections(port: int) -> int:
    """How many the server at `port` has, as the system says."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return sum(line[1].endswith(f":{port:04X}") and line[3] == "01" for line in lines)


def test_a_header_without_end_is_not_collected(site: Site) -> None:
    with site.connect(b"GET / HTTP/1.1\r\n") as endless, pytest.raises(OSError):
        while True:
            endless.sendall(b"X: " + b"x" * 1000 + b"\r\n")


def test_a_connection_waits_for_its_next_request_for_longer_than_a_header_may_take(hasty: Site) -> None:
    with httpx.Client(timeout=PATIENCE) as client:
        assert client.get(f"http://127.0.0.1:{hasty.port}/").status_code == 200
        with hasty.connect() as idle:
            wait_until_closed(idle)
        answer = client.get(f"http://127.0.0.1:{hasty.port}/", extensions={"trace": refuse_to_connect})
        assert answer.status_code == 200


def refuse_to_connect(event: str, _: object) -> None:
    assert event != "connection.connect_tcp.started", "the first connection was closed"
