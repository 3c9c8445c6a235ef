"""A server that speaks as Triton does over HTTP, and whose answers are written in advance."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

Pieces = list[str] | Callable[[int], list[str]]


@dataclass
class ScriptedTriton:
    """What is served and said, and what was asked.

    Attributes:
        catalogue: the entries of adapters, and of the base as "gemma", by name.
        pieces: of every answer, as the engine would send them; or a function that makes them of the seed.
        asked: `text_input` of each request and its sampling parameters.
    """

    catalogue: dict[str, dict[str, Any]]
    pieces: Pieces
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    url: str = ""
    may_answer: Event = field(default_factory=Event)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No answer comes meanwhile."""
        self.may_answer.clear()
        try:
            yield
        finally:
            self.may_answer.set()

    def entries(self, name: str) -> list[dict[str, Any]]:
        shown = [entry for other, entry in self.catalogue.items() if other != "gemma"]
        return shown if name == "" else [self.catalogue[name]]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Status and body of what is answered to a POST request."""
        if path.endswith("/generate"):
            name = body["name"]
            if name and name not in self.catalogue:
                return 404, json.dumps({"error": f"unknown_adapter: there is no adapter '{name}'"})
            return 200, json.dumps({"catalogue": json.dumps(self.entries(name))})
        sampling = json.loads(body["sampling_parameters"])
        self.asked.append((body["text_input"], sampling))
        self.may_answer.wait()
        pieces = self.pieces(sampling["seed"]) if callable(self.pieces) else self.pieces
        events = [{"text_output": piece, "num_output_tokens": 1} for piece in pieces]
        events += [{"text_output": "", "finish_reason": "stop", "num_input_tokens": 9}]
        return 200, "".join(f"data: {json.dumps(event)}\n\n" for event in events)


@contextmanager
def scripted_triton(
    catalogue: dict[str, dict[str, Any]], pieces: list[str] | Callable[[int], list[str]]
) -> Iterator[ScriptedTriton]:
    script = ScriptedTriton(catalogue, pieces)
    script.may_answer.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, "")  # ready

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._send(*script.answer(self.path, body))

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield script
    server.shutdown()
    server.server_close()
