"""A loopback server that speaks the OpenAI chat API: what cannot be had here is the model, not DSPy's way to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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


class LMServer:
    """Answers each chat completion with what `answer(request)` gives: a text, or a status, a body and maybe headers.

    To a request with `stream`, a string is sent in small pieces, an iterator in its own pieces, each as soon as it is
    there; bytes are sent unchanged.

    `requests`: all bodies received. `authorizations`: the headers. `gate`: while cleared, answers are held back.
    `ended`: released with each connection that was opened since `serve` and has ended.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        self._idle = threading.Condition()
        self._answering = 0
        self.serve(answer)
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                self._ended = owner.ended

            def do_POST(self) -> None:
                with owner._idle:
                    owner._answering += 1
                try:
                    self._answer()
                finally:
                    with owner._idle:
                        owner._answering -= 1
                        owner._idle.notify_all()

            def _answer(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                owner.authorizations.append(self.headers.get("Authorization"))
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

        self._server = _Server(("127.0.0.1", 0), Handler)
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
        """Let held answers go; whether all requests are answered in time."""
        self.gate.set()
        with self._idle:
            return self._idle.wait_for(lambda: self._answering == 0, patience)

    def _wait_for_gate(self, connection: Any) -> bool:
        """True once the gate is open, False if the client closes its connection first."""
        import select

        while not self.gate.wait(0.01):
            readable, _, _ = select.select([connection], [], [], 0)
            try:
                closed = bool(readable) and connection.recv(1, 2) == b""  # MSG_PEEK
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


def script(*answers: Answer) -> Callable[[dict[str, Any]], Answer]:
    """What an LM answers, one request after the other; the last answer again and again."""
    left = list(answers)
    return lambda _request: left.pop(0) if len(left) > 1 else left[0]
