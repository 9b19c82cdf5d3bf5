"""A loopback server that speaks the OpenAI chat API: what cannot be had here is the model, not DSPy's way to it."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.sax.saxutils import escape

import reacts

# The key of all of them, which nothing may log.
KEY = "sk-test-0123456789"


@dataclass
class Ended:
    """An answer with another finish reason than "stop"; `length`: it was cut off."""

    answer: str | Iterator[str | bytes]
    reason: str = "length"


Reply = tuple[int, dict[str, Any]] | tuple[int, dict[str, Any], dict[str, str]]
Answer = str | Reply | Iterator[str | bytes] | Ended


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        # `changed`: for each change of the rest. `open`: the connections by the client's port. `accepted`: the last
        # port. `answering`: how many requests.
        self.changed = threading.Condition()
        self.open: dict[int, socket.socket] = {}
        self.accepted = 0
        self.answering = 0

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.changed:
            self.accepted = client_address[1]
            self.open[self.accepted] = request
            self.changed.notify_all()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.changed:
            self.open = {port: other for port, other in self.open.items() if other is not request}
            self.changed.notify_all()
        super().shutdown_request(request)

    def idle(self) -> bool:
        """Whether nothing that was sent before waits to be read or answered."""
        return not self.answering and not _readable(*self.open.values(), patience_ms=0)


def _readable(*connections: socket.socket, patience_ms: int | None) -> bool:
    """Whether one of them has something to read, or has ended; not by `select`: it takes 1,024 descriptors."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    return bool(poll.poll(patience_ms))


class LMServer:
    """Answers each chat completion with what `answer(request)` gives: a text, or a status, a body and maybe headers.

    To a request with `stream`, a string is sent in small pieces, an iterator in its own pieces, each as soon as it is
    there; bytes are sent unchanged.

    `requests`: all bodies received. `authorizations`: the headers. `gate`: while cleared, answers are held back.
    `ended`: released with each connection that was opened since `serve` and has ended.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        self.serve(answer)
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                self._ended = owner.ended

            def handle_one_request(self) -> None:
                # It counts as soon as its first byte is read.
                _readable(self.connection, patience_ms=None)
                with server.changed:
                    server.answering += 1
                try:
                    super().handle_one_request()
                finally:
                    with server.changed:
                        server.answering -= 1
                        server.changed.notify_all()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                owner.authorizations.append(self.headers.get("Authorization") or self.headers.get("api-key"))
                owner.arrived.release()
                if not owner._wait_for_gate(self.connection):
                    self.close_connection = True
                    return
                given = owner._answer(body)
                reason = "stop"
                if isinstance(given, Ended):
                    given, reason = given.answer, given.reason
                if body.get("stream") and not isinstance(given, tuple):
                    self._stream(body["model"], pieces(given) if isinstance(given, str) else given, reason)
                    return
                assert not isinstance(given, Iterator), "the request asks for no stream"
                made = given if isinstance(given, tuple) else (200, completion(body["model"], given, reason))
                status, reply, *headers = made
                more = "".join(f"{name}: {value}\r\n" for some in headers for name, value in some.items())
                data = json.dumps(reply).encode()
                # Headers and body in one write, else delayed ACKs add 40 ms.
                kind = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n{more}"
                head = f"HTTP/1.1 {status} OK\r\n{kind}\r\n"
                try:
                    self.wfile.write(head.encode() + data)
                except OSError:
                    owner.closed_by_client.release()

            def _stream(self, model: str, given: Iterator[str | bytes], reason: str) -> None:
                self.close_connection = True
                head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
                try:
                    self.wfile.write(head.encode())
                    for piece in given:
                        if isinstance(piece, str):
                            piece = event(model, {"role": "assistant", "content": piece}, None)
                        self.wfile.write(piece)
                    self.wfile.write(event(model, {}, reason) + b"data: [DONE]\n\n")
                except OSError:
                    owner.closed_by_client.release()

            def finish(self) -> None:
                super().finish()
                self._ended.release()

            def log_message(self, *_: object) -> None:
                pass

        self._server = server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def serve(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        """Answer like this from now on, and forget what was received before."""
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        self.closed_by_client = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self._answer = answer

    def becomes_idle(self, patience: float) -> bool:
        """Let held answers go; whether all requests that were sent before are answered in time, cancelled ones too."""
        self.gate.set()
        server = self._server
        # Connections are accepted in their order: after this one no earlier one is left.
        with socket.create_connection(server.server_address[:2]) as last, server.changed:
            port = last.getsockname()[1]
            if not server.changed.wait_for(lambda: server.accepted == port, patience):
                return False
            end = time.monotonic() + patience
            while not server.idle():
                if not server.changed.wait(0.01) and time.monotonic() > end:
                    return False
        return True

    def _wait_for_gate(self, connection: Any) -> bool:
        """True once the gate is open, False if the client closes its connection first."""
        while not self.gate.wait(0.01):
            try:
                closed = _readable(connection, patience_ms=0) and connection.recv(1, 2) == b""  # MSG_PEEK
            except OSError:
                closed = True
            if closed:
                self.closed_by_client.release()
                return False
        return True

    def stop(self) -> None:
        """Stop listening and let held answers go."""
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def options(self, **more: Any) -> dict[str, Any]:
        """Keyword arguments of dspy.LM that lead here."""
        return {"api_base": self.url, "api_key": KEY, "cache": False, "num_retries": 0, **more}


def event(model: str, delta: dict[str, Any], finish: str | None) -> bytes:
    """A server-sent event of a streamed completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 0, "model": model, "choices": [choice]}
    if finish is not None:
        chunk["usage"] = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def pieces(text: str) -> Iterator[str]:
    """A string as an LM would stream it: tokens of a few characters."""
    return (text[at : at + 4] for at in range(0, len(text), 4))


def completion(model: str, text: str, reason: str = "stop") -> dict[str, Any]:
    """A chat completion."""
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
    }


def chat(**fields: object) -> str:
    """An answer in the format of DSPy's chat adapter."""
    parts = [f"[[ ## {name} ## ]]\n{value}" for name, value in fields.items()]
    return "\n\n".join([*parts, "[[ ## completed ## ]]"])


def written(adapter: str, **fields: Any) -> str:
    """An answer in the format of one of DSPy's adapters."""
    if adapter == "json":
        return json.dumps(fields)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    if adapter == "chat":
        return chat(**texts)
    return "\n\n".join(f"<{name}>\n{escape(text)}\n</{name}>" for name, text in texts.items())


def tool_calls(*calls: tuple[str, str], text: str | None = None) -> Reply:
    """An answer with native tool calls, whose arguments are JSON."""
    body = completion("stub", "", "tool_calls")
    asked = [
        {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls)
    ]
    body["choices"][0]["message"].update(content=text, tool_calls=asked)
    return 200, body


def script(*answers: Answer) -> Callable[[dict[str, Any]], Answer]:
    """What an LM answers, one request after the other; the last answer again and again."""
    left = reacts.for_version(answers)
    return lambda _request: left.pop(0) if len(left) > 1 else left[0]
