"""An OpenAI-compatible endpoint on this machine that answers as a test tells it to, well or badly."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-a-secret-0123456789"


class Handler(BaseHTTPRequestHandler):
    """Notes what is asked, and leaves the answer to the endpoint's next behaviour."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.endpoint.probe(self)

    def do_POST(self) -> None:
        endpoint = self.server.endpoint
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        endpoint.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
        queued = endpoint.answers
        (queued.pop(0) if len(queued) > 1 else queued[0])(self)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on stderr."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    endpoint: "Endpoint"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news here."""


Behaviour = Callable[[Handler], None]


def send(
    body: bytes,
    *,
    status: int = 200,
    kind: str = "application/json",
    length: int | None = None,
    **headers: str,
) -> Behaviour:
    """Answer with these bytes; ``length`` may lie."""

    def behave(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def say(text: Any) -> Behaviour:
    """A chat completion with this content."""
    return send(json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


def refuse(status: int, message: str = "no", **headers: str) -> Behaviour:
    return send(json.dumps({"error": {"message": message}}).encode(), status=status, **headers)


def hang(seconds: float) -> Behaviour:
    def behave(handler: Handler) -> None:
        time.sleep(seconds)

    return behave


def drip(handler: Handler) -> None:
    """One byte now and then: no single wait is long, all of them never end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def hang_up(handler: Handler) -> None:
    """No answer at all."""
    handler.connection.shutdown(socket.SHUT_RDWR)


@dataclass
class Endpoint:
    """What it was asked, and how it will answer."""

    url: str = ""
    answers: list[Behaviour] = field(default_factory=lambda: [say("1: it is better")])
    """One after the other; the last stays."""
    probe: Behaviour = field(default_factory=lambda: send(b'{"data": []}'))
    asked: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    server = Server(("127.0.0.1", 0), Handler)
    server.endpoint = endpoint
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
