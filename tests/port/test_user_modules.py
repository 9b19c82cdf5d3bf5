"""Modules of the host's own, with only a sync `forward`: whatever they do, pings, deadlines and the peer go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import lm_env
from peer import PATIENCE, ROOT, Peer

HOST = '''
import dspy, os, sys, threading, time

class Shout(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.inner = dspy.Predict(signature)
    def forward(self, question):
        return dspy.Prediction(answer=self.inner(question=question).answer.upper())

class Async(Shout):
    async def aforward(self, question):
        return dspy.Prediction(answer=(await self.inner.acall(question=question)).answer + "!")

class Plain(dspy.Module):
    def forward(self, question):
        return {"dict": {"answer": "d"}, "text": "t", "none": None}.get(question, question)

class Sleeps(dspy.Module):
    def forward(self, question):
        time.sleep(float(question))
        return "slept"

class Busy(dspy.Module):
    def forward(self, question):
        end = time.monotonic() + float(question)
        while time.monotonic() < end:
            pass
        return "counted"

class Raises(dspy.Module):
    def forward(self, question):
        raise {"exit": SystemExit(1), "value": ValueError("v"), "interrupt": KeyboardInterrupt()}[question]

class Twice(dspy.Module):
    """Asks the LM, then again."""
    def __init__(self, signature):
        super().__init__()
        self.inner = dspy.Predict(signature)
    def forward(self, question):
        try:
            self.inner(question=question)
        finally:
            try:
                self.inner(question=question + " again")
            finally:
                open(os.environ["TOLD"], "a").write("ended\\n")
        return "done"

class Broken(dspy.Module):
    def __init__(self):
        sys.exit(5)

class NoModule:
    pass
'''


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts a peer that may load `host`."""
    (tmp_path / "host.py").write_text(HOST)
    peers = []

    def start(*flags: str, **env: str) -> Peer:
        path = f"{ROOT}:{tmp_path}"
        settings = {"DSPY_BRIDGE_LM": "offline/echo", "DSPY_BRIDGE_ALLOW_MODULES": "host", "PYTHONPATH": path, **env}
        peers.append(Peer(*flags, env={**settings, "TOLD": str(tmp_path / "told")}))
        return peers[-1]

    yield start
    for peer in peers:
        peer.__exit__()


def create(peer: Peer, name: str) -> dict[str, Any]:
    return peer.call("create_program", {"id": name, "signature": "question -> answer", "program_type": f"host:{name}"})


def ask(name: str, question: str) -> dict[str, Any]:
    return {"program_id": name, "inputs": {"question": question}}


def test_they_are_built_with_the_signature_and_answer(start: Any) -> None:
    peer = start()
    for name, answer in (("Shout", "ECHO: WHY?"), ("Async", "echo: Why?!")):
        assert create(peer, name)["success"]
        assert peer.call("execute_program", ask(name, "Why?"))["result"] == {"answer": answer}
    assert create(peer, "Plain")["success"]
    for question, answer in (("dict", "d"), ("text", "t"), ("none", None), ("x", "x")):
        assert peer.call("execute_program", ask("Plain", question))["result"] == {"answer": answer}


@pytest.mark.parametrize(
    ("path", "error_type"),
    [
        ("os:system", "not_allowed"),
        ("hostile:Shout", "not_allowed"),
        ("host:Gone", "invalid_args"),
        ("host.gone:Shout", "invalid_args"),
        ("host:NoModule", "invalid_args"),
        ("host:", "invalid_args"),
        ("host:Broken", "internal"),
    ],
)
def test_what_is_not_allowed_or_no_module_is_refused(start: Any, path: str, error_type: str) -> None:
    peer = start()
    reply = peer.call("create_program", {"id": "x", "signature": "question -> answer", "program_type": path})
    assert reply["error_type"] == error_type, reply
    assert peer.call("list_programs")["result"] == {"programs": []}


def test_none_is_allowed_by_default(start: Any) -> None:
    reply = create(start(DSPY_BRIDGE_ALLOW_MODULES=""), "Shout")
    assert reply["error_type"] == "not_allowed" and "DSPY_BRIDGE_ALLOW_MODULES" in reply["error"]


@pytest.mark.parametrize("question", ["exit", "value", "interrupt"])
def test_whatever_they_raise_is_one_reply(start: Any, question: str) -> None:
    peer = start()
    create(peer, "Raises")
    assert peer.call("execute_program", ask("Raises", question))["error_type"] == "internal"
    assert peer.call("ping")["success"]


@pytest.mark.parametrize("name", ["Sleeps", "Busy"])
def test_code_that_blocks_keeps_no_ping_and_no_deadline_waiting(start: Any, name: str) -> None:
    """Four at once, for two seconds."""
    peer = start()
    create(peer, name)
    others = {peer.request("execute_program", ask(name, "2")) for _ in range(4)}
    late = peer.request("execute_program", ask(name, "2"), timeout_ms=300)
    begin = time.monotonic()
    slowest, lateness, told = 0.0, 0.0, {}
    while len(told) < 5:
        sent = time.monotonic()
        id = peer.request("ping")
        while (reply := peer.receive())["id"] != id:
            told[reply["id"]] = reply
            lateness = lateness or (time.monotonic() - begin if reply["id"] == late else 0.0)
        slowest = max(slowest, time.monotonic() - sent)
    assert slowest < 0.25
    assert told[late]["error_type"] == "timeout" and 0.3 <= lateness < 1
    assert all(told[id]["success"] for id in others)


def test_abandoned_threads_are_counted_until_they_return(start: Any) -> None:
    peer = start()
    create(peer, "Sleeps")
    assert peer.call("execute_program", ask("Sleeps", "0.5"), timeout_ms=50)["error_type"] == "timeout"
    assert peer.call("get_stats")["result"]["threads"] == {"running": 1, "abandoned": 1, "max": 64}
    assert peer.call("execute_program", ask("Sleeps", "0.6"))["success"]
    assert peer.call("get_stats")["result"]["threads"] == {"running": 0, "abandoned": 0, "max": 64}


def test_code_that_never_returns_takes_all_threads_but_nothing_else(start: Any) -> None:
    peer = start("--drain-ms", "100")
    for name in ("Sleeps", "Async"):
        create(peer, name)
    for _ in range(70):
        peer.request("execute_program", ask("Sleeps", "60"), timeout_ms=200)
    assert {peer.receive()["error_type"] for _ in range(70)} == {"timeout"}
    assert peer.call("get_stats")["result"]["threads"]["abandoned"] == 64
    assert peer.call("execute_program", ask("Async", "Why?"))["success"], "what runs on the loop needs no thread"
    assert peer.call("execute_program", ask("Sleeps", "0"), timeout_ms=100)["error_type"] == "timeout"
    assert peer.finish()[0] == 0


def test_given_up_its_lm_request_is_closed_and_the_next_one_refused(start: Any, start_lm: Any, tmp_path: Path) -> None:
    server = start_lm()
    server.gate.clear()
    peer = start(**lm_env(server))
    create(peer, "Twice")
    assert peer.call("execute_program", ask("Twice", "Why?"), timeout_ms=500)["error_type"] == "timeout"
    assert server.closed_by_client.acquire(timeout=PATIENCE)
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "told").exists():
        assert time.monotonic() < end
        assert peer.call("ping")["success"]
    assert len(server.requests) == 1
    server.gate.set()
    assert peer.call("execute_program", ask("Twice", "Why?"))["result"] == {"answer": "done"}
    assert len(server.requests) == 3
