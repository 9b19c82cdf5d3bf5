"""What is read of an LM's answer has a limit, plain and streamed."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from threading import Semaphore, Thread
from typing import Any

import dspy
import psutil
import pytest
from lm_server import _Server, chat, completion, event
from peer import PATIENCE, Peer

from dspy_bridge.lm import event_loop_lm  # noqa: F401  # its import brings sync calls to the event loop
from dspy_bridge.lm.transport import outgoing

QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"program_id": "qa", "inputs": {"question": "?"}}
LIMIT = 1024 * 1024


class Sender:
    """Answers each request with `head` and then `body(streamed)`, until that ends or the client has closed."""

    def __init__(self, head: str, body: Callable[[bool], Iterator[bytes]]) -> None:
        self.closed_by_client = Semaphore(0)
        self.requests = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests += 1
                self.close_connection = True
                kind = "text/event-stream" if asked.get("stream") else "application/json"
                lines = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n{head}\r\n"
                try:
                    self.wfile.write(lines.encode())
                    for piece in body(bool(asked.get("stream"))):
                        self.wfile.write(piece)
                except OSError:
                    owner.closed_by_client.release()

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.options = {"api_base": f"http://127.0.0.1:{self._server.server_port}/v1", "api_key": "sk-0123456789"}

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def send() -> Iterator[Callable[..., Sender]]:
    senders: list[Sender] = []

    def start(head: str, body: Callable[[bool], Iterator[bytes]]) -> Sender:
        senders.append(Sender(head, body))
        return senders[-1]

    yield start
    for sender in senders:
        sender.stop()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    """One for all: LMs are given with the calls."""
    with Peer("--max-lm-bytes", str(LIMIT)) as peer:
        assert peer.call("create_program", QA)["success"]
        yield peer


def answer(text: str, streamed: bool) -> bytes:
    if not streamed:
        return json.dumps(completion("x", text)).encode()
    return event("x", {"role": "assistant", "content": text}, None) + event("x", {}, "stop") + b"data: [DONE]\n\n"


def execute(peer: Peer, sender: Sender, streamed: bool, **more: Any) -> dict[str, Any]:
    lm = {"model": "openai/x", **sender.options, "cache": False, **more}
    id = peer.request("execute_program", {**ASK, "lm": lm}, stream=streamed, timeout_ms=PATIENCE * 1000)
    while "stream" in (frame := peer.receive()):
        pass
    assert frame["id"] == id
    return frame


def endless(streamed: bool) -> Iterator[bytes]:
    for number in itertools.count():
        yield event("x", {"content": f"{number} " * 1000}, None) if streamed else b" " * 65536


def bomb(_streamed: bool) -> Iterator[bytes]:
    """A gigabyte in one megabyte."""
    packer = zlib.compressobj(9, wbits=31)
    piece = b" " * (1 << 20)
    for _ in range(1024):
        yield packer.compress(piece)
    yield packer.flush()


EACH = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


@EACH
@pytest.mark.parametrize("body", [endless, bomb])
def test_past_the_limit_the_call_fails_for_good_and_the_connection_is_closed(
    peer: Peer, send: Any, streamed: bool, body: Any
) -> None:
    """DSPy's engine unpacks before the bytes are counted."""
    sender = send("Content-Encoding: gzip\r\n" if body is bomb else "", body)
    process = psutil.Process(peer.process.pid)
    before = process.memory_info().rss
    reply = execute(peer, sender, streamed, num_retries=3)
    assert (reply["error_type"], reply["retryable"]) == ("lm_error", False), reply
    assert "DSPY_BRIDGE_MAX_LM_BYTES" in reply["error"] and str(LIMIT) in reply["error"]
    assert sender.closed_by_client.acquire(timeout=PATIENCE)
    assert sender.requests == 1, "it is not tried again"
    assert process.memory_info().rss - before < 300_000_000
    assert peer.call("ping")["success"]


@EACH
@pytest.mark.parametrize("packed", [False, True], ids=["as it is", "packed"])
def test_below_the_limit_an_answer_is_whole(peer: Peer, send: Any, streamed: bool, packed: bool) -> None:
    text = "word, " * (LIMIT // 8) if not streamed else "word, " * 1000
    data = answer(chat(answer=text), streamed)
    assert len(data) < LIMIT
    sender = send(
        "Content-Encoding: gzip\r\n" if packed else "", lambda _: iter([gzip.compress(data) if packed else data])
    )
    assert execute(peer, sender, streamed)["result"] == {"answer": text.strip()}


def test_an_lm_that_the_application_calls_in_a_thread_has_the_same_limit(
    send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "most", LIMIT)
    data = [answer("short", False), b" " * LIMIT]
    short, long = send("", lambda _: iter(data[:1])), send("", lambda _: iter(data))
    lms = [dspy.LM("openai/x", cache=False, num_retries=2, **sender.options) for sender in (short, long)]
    assert lms[0]("hello") == ["short"]
    with pytest.raises(outgoing.LMAnswerRefused):
        lms[1]("hello")
    assert long.requests == 1
