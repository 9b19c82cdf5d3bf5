"""Limits of an LM's account in a whole peer: a loopback server counts what arrives, and holds answers back."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SLOW_BY_LITELLM, lm_env
from lm_server import LMServer, chat, script
from peer import PATIENCE, ROOT, Peer
from shared_peers import shared_peer

QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"program_id": "qa", "inputs": {"question": "What is the capital of France?"}}
PARIS = chat(answer="Paris")
# Longer than any test, shorter than the wait that it is to fail for.
HOURS = 3_600_000
ENGINES = pytest.mark.parametrize("engine", [pytest.param({}, id="native"), SLOW_BY_LITELLM])
REFUSED = {"error": {"message": "slow down", "type": "error"}}


keys = itertools.count(1000)


def account(server: LMServer, **options: Any) -> dict[str, Any]:
    """An LM with a key that no test has used: a peer that tests share knows nothing of its account."""
    return {"model": "openai/stub-model", **server.options(api_key=f"sk-limits-{next(keys)}", **options)}


def refusal(seconds: object, status: int = 429) -> Any:
    return status, REFUSED, {"Retry-After": str(seconds)}


def wait_for(server: LMServer, count: int) -> None:
    for _ in range(count):
        assert server.arrived.acquire(timeout=PATIENCE)


class Counting:
    """Answers, and counts the requests that are without one: `most` at once."""

    def __init__(self, server: LMServer) -> None:
        self.most = 0
        self._answered = 0
        self._lock = threading.Lock()
        self._server = server
        server.serve(self)

    def __call__(self, _request: dict[str, Any]) -> str:
        with self._lock:
            self.most = max(self.most, len(self._server.requests) - self._answered)
            self._answered += 1
        return PARIS


@ENGINES
@pytest.mark.parametrize("stream", [False, True])
def test_no_more_than_max_in_flight_reach_the_server_at_once(
    start_lm: Any, engine: dict[str, Any], stream: bool
) -> None:
    """Of two programs with the same server and key."""
    server, other = start_lm(), start_lm()
    counting = Counting(server)
    with shared_peer(env=lm_env(server)) as peer:
        lm = account(server, max_in_flight=2, **engine)
        peer.call("create_program", {**QA, "lm": lm})
        peer.call("create_program", {**QA, "id": "own", "lm": {**lm, "model": "openai/other"}})
        server.gate.clear()
        ids = [peer.request("execute_program", {**ASK, "program_id": id}, stream=stream) for id in ("qa", "own") * 3]
        wait_for(server, 2)
        # By the time that a later run has asked another server, those before it would have asked this one.
        ids.append(peer.request("execute_program", {**ASK, "lm": {"model": "openai/m", **other.options()}}))
        wait_for(other, 1)
        assert len(server.requests) == 2
        server.gate.set()
        replies: dict[Any, Any] = {}
        while len(replies) < len(ids):
            reply = peer.receive()
            if "success" in reply:
                replies[reply["id"]] = reply
    assert all(reply["success"] for reply in replies.values()) and len(server.requests) == 6
    assert counting.most == 2


@ENGINES
def test_a_request_past_the_rate_waits_or_fails_at_once_if_its_deadline_is_before(
    start_lm: Any, engine: dict[str, Any]
) -> None:
    server = start_lm()
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {**QA, "lm": account(server, requests_per_minute=2, **engine)})
        assert all(peer.call("execute_program", ASK, timeout_ms=HOURS)["success"] for _ in range(2))
        begun = time.monotonic()
        reply = peer.call("execute_program", ASK, timeout_ms=5000)
        assert time.monotonic() - begun < 4
        assert reply["error_type"] == "overloaded" and "retryable" not in reply
        assert "requests_per_minute (2)" in reply["error"] and "left" in reply["error"]
        # Without a deadline it waits: its cancellation is the only reply.
        waiting = peer.request("execute_program", ASK)
        assert peer.call("ping")["success"]
        peer.send({"cancel": waiting})
        assert peer.receive()["error_type"] == "cancelled"
    assert len(server.requests) == 2


@ENGINES
def test_tokens_are_counted_from_answers_and_may_bring_debt(start_lm: Any, engine: dict[str, Any]) -> None:
    """18 of each answer. With and without meta, which has its own count."""
    server = start_lm()
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {**QA, "lm": account(server, tokens_per_minute=30, **engine)})
        for meta in (False, True):
            reply = peer.call("execute_program", ASK, timeout_ms=HOURS, meta=meta)
            assert reply["success"]
        assert reply["meta"]["lm_usage"]["openai/stub-model"]["total_tokens"] == 18
        reply = peer.call("execute_program", ASK, timeout_ms=5000)
        assert reply["error_type"] == "overloaded" and "tokens_per_minute (30)" in reply["error"]
    assert len(server.requests) == 2


def test_cached_answers_count_for_nothing(start_lm: Any) -> None:
    server = start_lm()
    with shared_peer(env=lm_env(server)) as peer:
        lm = account(server, requests_per_minute=1, tokens_per_minute=18)
        peer.call("create_program", {**QA, "lm": {**lm, "cache": True}})
        for _ in range(5):
            assert peer.call("execute_program", ASK, timeout_ms=5000)["success"]
        other = {**ASK, "inputs": {"question": "another"}}
        assert peer.call("execute_program", other, timeout_ms=5000)["error_type"] == "overloaded"
    assert len(server.requests) == 1


@ENGINES
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_holds_all_calls_of_the_account_once(start_lm: Any, engine: dict[str, Any], status: int) -> None:
    """Without any limit: the one that was refused is sent again, the others are sent late, each once."""
    server = start_lm(script(refusal(2, status), PARIS))
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {**QA, "lm": account(server, **{"num_retries": 2, **engine})})
        first = peer.request("execute_program", ASK)
        wait_for(server, 1)
        begun = time.monotonic()
        # Its answer is on its way: from then on none is sent, which those show that cannot wait.
        while (late := peer.call("execute_program", ASK, timeout_ms=500))["success"]:
            pass
        assert late["error_type"] == "overloaded" and "which asked for a pause" in late["error"], late
        sent = len(server.requests)
        others = [peer.request("execute_program", ASK) for _ in range(4)]
        replies = peer.receive_all(5)
        assert all(replies[id]["success"] for id in (first, *others))
        assert time.monotonic() - begun > 1.8
        assert len(server.requests) == sent + 5


@ENGINES
def test_retry_after_past_the_deadline_fails_the_one_that_is_refused_at_once(
    start_lm: Any, engine: dict[str, Any]
) -> None:
    """Another key is another account."""
    server = start_lm(script(refusal(60), PARIS))
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {**QA, "lm": account(server, **{"num_retries": 2, **engine})})
        reply = peer.call("execute_program", ASK, timeout_ms=20_000)
        refused = re.fullmatch(r"the LM's server refused a request for ([\d.]+) s; .* s are left", reply["error"])
        assert reply["error_type"] == "overloaded" and refused is not None, reply
        reply = peer.call("execute_program", ASK, timeout_ms=20_000)
        late = re.match(r"the LM's next request would have to wait ([\d.]+) s", reply["error"])
        assert reply["error_type"] == "overloaded" and late is not None, reply
        assert 20 < float(late[1]) <= float(refused[1]) <= 60, "for as long as it asked"
        assert len(server.requests) == 1
        assert peer.call("execute_program", {**ASK, "lm": account(server)}, timeout_ms=20_000)["success"]


HOST = """
import contextvars
from concurrent.futures import ThreadPoolExecutor

import dspy

class Threads(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.ask = dspy.Predict(signature)
    def forward(self, question):
        # Not by dspy.Parallel: its progress bar fails now and then in two runs at once.
        def ask(context, n):
            return context.run(self.ask, question=f"{question} {n}").answer
        with ThreadPoolExecutor(4) as threads:
            answers = threads.map(ask, [contextvars.copy_context() for _ in range(4)], range(4))
        return dspy.Prediction(answer=" ".join(answers))

class Twice(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.ask = dspy.Predict(signature)
    async def aforward(self, question):
        await self.ask.acall(question=question)
        return await self.ask.acall(question=question)
"""


@pytest.fixture
def host_peer(start_lm: Any, folder: Path) -> Iterator[Peer]:
    """A peer that may run the modules of `HOST`."""
    with shared_peer(
        env={
            "DSPY_BRIDGE_LM": "offline/echo",
            "PYTHONPATH": f"{ROOT}:{folder}",
            "DSPY_BRIDGE_ALLOW_MODULES": "host",
        }
    ) as peer:
        yield peer


@ENGINES
def test_one_limit_holds_on_both_event_loops_and_in_threads(
    start_lm: Any, engine: dict[str, Any], host_peer: Peer
) -> None:
    server = start_lm()
    counting = Counting(server)
    server.gate.clear()
    lm = account(server, max_in_flight=2, **engine)
    host_peer.call("create_program", {**QA, "lm": lm})
    host_peer.call("create_program", {**QA, "id": "threads", "program_type": "host:Threads", "lm": lm})
    large = {**ASK, "inputs": {"question": "x" * (1 << 20)}}
    for _ in range(3):
        for args in (ASK, {**ASK, "program_id": "threads"}, large):
            host_peer.request("execute_program", args)
    wait_for(server, 2)
    server.gate.set()
    replies = host_peer.receive_all(9)
    assert all(reply["success"] for reply in replies.values()), replies
    assert len(server.requests) == 3 * (1 + 4 + 1) and counting.most == 2


def test_a_run_that_has_begun_is_not_to_be_sent_again(start_lm: Any, host_peer: Peer) -> None:
    """Else a pool's next peer would call its tools once more."""
    server = start_lm()
    lm = account(server, requests_per_minute=3)
    host_peer.call("create_program", {**QA, "program_type": "host:Twice", "lm": lm})
    assert host_peer.call("execute_program", ASK, timeout_ms=10_000)["success"]
    reply = host_peer.call("execute_program", ASK, timeout_ms=10_000)
    assert reply["error_type"] == "overloaded" and reply["retryable"] is False
    reply = host_peer.call("execute_program", ASK, timeout_ms=10_000)
    assert reply["error_type"] == "overloaded" and "retryable" not in reply
