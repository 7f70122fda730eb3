"""A local OpenAI-compatible endpoint that answers as it is told, in a thread."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests import toy


@dataclass
class Answer:
    """One answer out of the ordinary: its status, headers and body; ``after_s`` lets the client wait."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0


@dataclass
class Endpoint:
    """What was asked, and what is answered before all is well. judge: says of the texts what is wrong, or None."""

    url: str
    script: list[Answer] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    judge: Callable[[list[str]], Answer | None] = lambda texts: None

    @property
    def texts(self) -> list[str]:
        return [t for body in self.asked for t in body["input"]]


def embeddings(texts: list[str]) -> dict[str, Any]:
    """The usual answer, its items in another order than asked, as the API allows."""
    vectors = toy.embed(texts).tolist()
    return {"data": [{"index": i, "embedding": v} for i, v in reversed(list(enumerate(vectors)))]}


@contextmanager
def serving() -> Iterator[Endpoint]:
    """An endpoint for the length of a block."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body in one packet: in two, the client's delayed acknowledgement costs 40 ms.
        wbufsize = -1

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                endpoint.asked.append(body)
                endpoint.keys.append(self.headers.get("Authorization"))
                endpoint.at.append(time.monotonic())
                answer = endpoint.script.pop(0) if endpoint.script else endpoint.judge(body["input"])
            answer = answer or Answer(body=embeddings(body["input"]))
            time.sleep(answer.after_s)
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            try:
                self.send_response(answer.status)
                for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1/embeddings")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
