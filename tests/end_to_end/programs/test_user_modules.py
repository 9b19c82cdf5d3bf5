"""User modules with only a sync `forward`: whatever they do, pings, deadlines and the peer work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from peer import ROOT, Peer
from shared_peers import shared_peer

HOST = '''
import asyncio, dspy, os, sys, threading, time

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

class Mute(Exception):
    def __str__(self):
        raise KeyboardInterrupt

# Each is raised many times, and would have all their tracebacks.
RAISED = {
    "exit": SystemExit(1), "value": ValueError("v"), "interrupt": KeyboardInterrupt(), "stop": StopIteration(3),
    "generator": GeneratorExit(), "mute": Mute(), "memory": MemoryError(), "base": BaseException("b"),
}

class Raises(dspy.Module):
    def forward(self, question):
        raise RAISED[question].with_traceback(None)

class AsyncRaises(dspy.Module):
    async def aforward(self, question):
        raise RAISED[question].with_traceback(None)

class Cancels(dspy.Module):
    def forward(self, question):
        raise asyncio.CancelledError

def down(question):
    return down(question)

class Deep(dspy.Module):
    def forward(self, question):
        return down(question)

class Unprintable:
    def __str__(self):
        raise SystemExit(1)
    __repr__ = __str__

class Returns(dspy.Module):
    def forward(self, question):
        deep = []
        for _ in range(100_000):
            deep = [deep]
        cycle = {}
        cycle["self"] = cycle
        answer = {"unprintable": Unprintable(), "deep": deep, "cycle": cycle, "huge": 10**5000, "nan": float("nan"),
                  "set": {1}, "class": Unprintable, "lone": "\\ud800", "bytes": b"ab"}[question]
        return dspy.Prediction(answer=answer, more={question: answer})

class AsyncReturns(Returns):
    async def aforward(self, question):
        return self.forward(question)

class Odd(dspy.Module):
    """Has two outputs, but does not return a prediction."""
    def forward(self, question):
        return Unprintable()

class Options(dspy.Module):
    def __init__(self, signature, k, *, style="plain", **more):
        super().__init__()

class Strict(dspy.Module):
    def __init__(self, k=1):
        super().__init__()
        if k > 1:
            raise ValueError(f"k is {k}")
    def forward(self, question):
        return "strict"

class Broken(dspy.Module):
    def __init__(self):
        sys.exit(5)

class NoModule:
    pass
'''


@pytest.fixture
def start(folder: Path) -> Iterator[Any]:
    """Starts a peer that may load `host`."""
    with ExitStack() as peers:

        def start(*flags: str, **env: str) -> Peer:
            path = f"{ROOT}:{folder}"
            settings = {"DSPY_BRIDGE_LM": "offline/echo", "DSPY_BRIDGE_ALLOW_MODULES": "host", "PYTHONPATH": path}
            return peers.enter_context(shared_peer(*flags, env={**settings, **env}))

        yield start


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


def test_whatever_they_raise_is_one_reply(start: Any) -> None:
    peer = start()
    for name in ("Raises", "AsyncRaises"):
        create(peer, name)
        for question in ("exit", "value", "interrupt", "stop", "generator", "mute", "memory", "base"):
            reply = peer.call("execute_program", ask(name, question), timeout_ms=20_000)
            assert reply["error_type"] == "internal", (name, question, reply)
            assert peer.call("ping")["success"]
    create(peer, "Cancels")
    assert peer.call("execute_program", ask("Cancels", "x"))["error_type"] in ("cancelled", "internal")
    create(peer, "Deep")
    reply = peer.call("execute_program", ask("Deep", "x"))
    assert reply["error_type"] == "internal" and "RecursionError" in reply["error"]
    assert peer.call("get_stats")["result"]["threads"]["running"] == 0
    assert peer.finish()[0] == 0


def test_whatever_they_return_is_one_reply(start: Any) -> None:
    peer = start()
    answers = {
        "unprintable": "<Unprintable: its str() raised SystemExit>",
        "nan": None,
        "set": [1],
        "lone": "?",
        "bytes": "YWI=",
        "deep": ...,
        "cycle": ...,
        "huge": ...,
        "class": ...,
    }
    for name in ("Returns", "AsyncReturns"):
        create(peer, name)
        for question, answer in answers.items():
            reply = peer.call("execute_program", ask(name, question))
            assert reply["success"], (name, question, reply)
            if answer is not ...:
                assert reply["result"] == {"answer": answer, "more": {question: answer}}
    peer.call("create_program", {"id": "Odd", "signature": "question -> answer, more", "program_type": "host:Odd"})
    reply = peer.call("execute_program", ask("Odd", "x"))
    assert (
        reply["error_type"] == "output_invalid" and "Unprintable" in reply["error"] and "answer, more" in reply["error"]
    )
    assert peer.finish()[0] == 0


@pytest.mark.parametrize(
    ("name", "more", "error_type", "named"),
    [
        ("Options", {}, "invalid_args", "missing a required argument: 'k'"),
        ("Options", {"options": {"k": 1}, "tools": [{"name": "t"}]}, "invalid_args", "tools: the constructor"),
        ("Strict", {"options": {"K": 1}}, "invalid_args", "got an unexpected keyword argument 'K'"),
        ("Strict", {"options": {"self": 1}}, "invalid_args", "options: "),
        ("Strict", {"options": {"k": 2}}, "internal", "ValueError"),
        ("Strict", {"options": {"k": "2"}}, "internal", "TypeError"),
    ],
)
def test_what_the_constructor_does_not_take_is_refused(
    building: Peer, name: str, more: dict[str, Any], error_type: str, named: str
) -> None:
    made = {"id": "bad", "signature": "question -> answer", "program_type": f"host:{name}", **more}
    reply = building.call("create_program", made)
    assert (reply.get("error_type"), named in reply["error"]) == (error_type, True), reply


@pytest.fixture(scope="module")
def building(folder: Path) -> Iterator[Peer]:
    with Peer(env={"DSPY_BRIDGE_ALLOW_MODULES": "host", "PYTHONPATH": f"{ROOT}:{folder}"}) as peer:
        yield peer


@pytest.mark.parametrize("name", [pytest.param("Sleeps", marks=pytest.mark.slow), "Busy"])
def test_code_that_blocks_keeps_no_ping_and_no_deadline_waiting(start: Any, name: str) -> None:
    """Four at once, for two seconds."""
    peer = start()
    create(peer, name)
    others = {peer.request("execute_program", ask(name, "2")) for _ in range(4)}
    late = peer.request("execute_program", ask(name, "2"), timeout_ms=300)
    begin = time.monotonic()
    slowest, lateness, replies = 0.0, 0.0, {}
    while len(replies) < 5:
        sent = time.monotonic()
        id = peer.request("ping")
        while (reply := peer.receive())["id"] != id:
            replies[reply["id"]] = reply
            lateness = lateness or (time.monotonic() - begin if reply["id"] == late else 0.0)
        slowest = max(slowest, time.monotonic() - sent)
    assert slowest < 1, "it did not wait for the code"
    assert replies[late]["error_type"] == "timeout" and 0.3 <= lateness < 1
    assert all(replies[id]["success"] for id in others)


def test_code_that_never_returns_takes_all_threads_but_nothing_else(start: Any) -> None:
    peer = start("--drain-ms", "100")
    for name in ("Sleeps", "Async"):
        create(peer, name)
    # On a busy machine some of them time out before they have a thread.
    while (abandoned := peer.call("get_stats")["result"]["threads"]["abandoned"]) < 64:
        for _ in range(70):
            peer.request("execute_program", ask("Sleeps", "60"), timeout_ms=200)
        assert {peer.receive()["error_type"] for _ in range(70)} == {"timeout"}
    assert abandoned == 64
    assert peer.call("execute_program", ask("Async", "Why?"))["success"], "what runs on the loop needs no thread"
    assert peer.call("execute_program", ask("Sleeps", "0"), timeout_ms=100)["error_type"] == "timeout"
    assert peer.finish()[0] == 0
