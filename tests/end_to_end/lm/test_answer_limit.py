"""What is read of an LM's answer has a limit, on both ways to it, plain and streamed, packed and not."""

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
import httpx
import psutil
import pytest
from lm_server import _Server, chat, completion, event
from peer import PATIENCE, Peer

from dspy_bridge.lm.transport import answer_limit, litellm_answer_limit, trace_headers

QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"program_id": "qa", "inputs": {"question": "?"}}
LIMIT = 1024 * 1024
# A header of one's own has DSPy call LiteLLM.
WAYS = {"native": {}, "litellm": {"extra_headers": {"X-Way": "litellm"}}}


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


def execute(peer: Peer, sender: Sender, way: str, streamed: bool, **more: Any) -> dict[str, Any]:
    lm = {"model": "openai/x", **sender.options, **WAYS[way], "cache": False, **more}
    id = peer.request("execute_program", {**ASK, "lm": lm}, stream=streamed, timeout_ms=PATIENCE * 1000)
    while "stream" in (frame := peer.receive()):
        pass
    assert frame["id"] == id
    return frame


def endless(streamed: bool) -> Iterator[bytes]:
    for number in itertools.count():
        # LiteLLM gives up an LM that says the same again and again.
        yield event("x", {"content": f"{number} " * 1000}, None) if streamed else b" " * 65536


def bomb(_streamed: bool) -> Iterator[bytes]:
    """A gigabyte in one megabyte."""
    packer = zlib.compressobj(9, wbits=31)
    piece = b" " * (1 << 20)
    for _ in range(1024):
        yield packer.compress(piece)
    yield packer.flush()


EACH = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
# LiteLLM for `make test-slow`: its import takes seconds.
ON_BOTH_WAYS = pytest.mark.parametrize("way", ["native", pytest.param("litellm", marks=pytest.mark.slow)])


@ON_BOTH_WAYS
@EACH
@pytest.mark.parametrize(
    ("head", "body"), [("", endless), ("Content-Encoding: gzip\r\n", bomb)], ids=["endless", "bomb"]
)
def test_past_the_limit_the_call_fails_for_good_and_the_connection_is_closed(
    peer: Peer, send: Any, way: str, streamed: bool, head: str, body: Any
) -> None:
    sender = send(head, body)
    process = psutil.Process(peer.process.pid)
    before = process.memory_info().rss
    reply = execute(peer, sender, way, streamed, num_retries=3)
    assert (reply["error_type"], reply["retryable"]) == ("lm_error", False), reply
    assert "DSPY_BRIDGE_MAX_LM_BYTES" in reply["error"] and str(LIMIT) in reply["error"]
    assert sender.closed_by_client.acquire(timeout=PATIENCE)
    assert sender.requests == 1, "it is not tried again"
    assert process.memory_info().rss - before < 300_000_000
    assert peer.call("ping")["success"]


@ON_BOTH_WAYS
@EACH
@pytest.mark.parametrize("packed", [False, True], ids=["as it is", "packed"])
def test_below_the_limit_an_answer_is_whole(peer: Peer, send: Any, way: str, streamed: bool, packed: bool) -> None:
    text = "word, " * (LIMIT // 8) if not streamed else "word, " * 1000
    data = answer(chat(answer=text), streamed)
    assert len(data) < LIMIT
    sender = send(
        "Content-Encoding: gzip\r\n" if packed else "", lambda _: iter([gzip.compress(data) if packed else data])
    )
    for _ in range(2):
        assert execute(peer, sender, way, streamed)["result"] == {"answer": text.strip()}


@ON_BOTH_WAYS
@pytest.mark.parametrize("coding", ["gzip, gzip", "zstd", "br"])
def test_what_is_packed_so_that_its_length_shows_too_late_is_refused(
    peer: Peer, send: Any, way: str, coding: str
) -> None:
    data = gzip.compress(gzip.compress(answer(chat(answer="Paris"), False)))
    sender = send(f"Content-Encoding: {coding}\r\n", lambda _: iter([data]))
    reply = execute(peer, sender, way, False, num_retries=0)
    assert reply["error_type"] == "lm_error", reply
    assert "packed 2 times" in reply["error"] or coding in reply["error"], reply


def test_other_users_of_httpx_have_no_limit(send: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with a client that LiteLLM has used."""
    monkeypatch.setattr(answer_limit, "most", 1000)
    sender = send("", lambda _: iter([b"x" * 5000]))
    with httpx.Client() as client:

        def ask() -> int:
            return len(client.post(sender.options["api_base"], json={}).content)

        for _ in range(2):
            with pytest.raises(answer_limit.LMAnswerRefused):
                litellm_answer_limit.limiting(ask)()
            assert ask() == 5000
        assert len(client.event_hooks["response"]) == 1


@ON_BOTH_WAYS
def test_sync_calls_have_the_same_limit(send: Any, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """As a module's own threads make them, with LMs of any kind."""
    trace_headers.install()
    # As in the peer: else LiteLLM, if nothing has imported it yet, fetches a price list first.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "true")
    monkeypatch.setattr(answer_limit, "most", LIMIT)
    data = [answer("short", False), b" " * LIMIT]
    short, long = send("", lambda _: iter(data[:1])), send("", lambda _: iter(data))
    lms = [dspy.LM("openai/x", cache=False, num_retries=2, **sender.options, **WAYS[way]) for sender in (short, long)]
    assert lms[0]("hello") == ["short"]
    with pytest.raises(answer_limit.LMAnswerRefused):
        lms[1]("hello")
    assert long.requests == 1
