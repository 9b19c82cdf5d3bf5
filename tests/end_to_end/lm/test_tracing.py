"""`traceparent`: a W3C trace context is passed from a request to its LM HTTP requests, the log and user code."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import reusable
from lm_server import Answer, LMServer, chat, script
from peer import PATIENCE, ROOT, Peer
from shared_peers import shared_peer

FIRST = "00-" + "a" * 32 + "-" + "1" * 16 + "-01"
SECOND = "00-" + "b" * 32 + "-" + "2" * 16 + "-00"
THIRD = "00-" + "c" * 32 + "-" + "3" * 16 + "-01"
QA = {"id": "qa", "signature": "question -> answer"}

HOST = '''
import logging
import dspy
from dspy_bridge import tracing

log = logging.getLogger("host")

class Logs(dspy.Module):
    async def aforward(self, question):
        log.warning("working on %s", question)
        return dspy.Prediction(answer=str(tracing.current()))

class LogsInThread(dspy.Module):
    def forward(self, question):
        log.warning("working on %s", question)
        return dspy.Prediction(answer=str(tracing.current()))

class Sync(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.inner = dspy.Predict(signature)
    def forward(self, question):
        return self.inner(question=question)

class Parallel(Sync):
    """In threads of DSPy's."""
    def forward(self, question):
        def one(question):
            log.warning("working on %s", question)
            return self.inner(question=question)
        first, _ = dspy.Parallel(num_threads=2, disable_progress_bar=True)([(one, {"question": q}) for q in "xy"])
        return first

class OwnLM(dspy.Module):
    """With an LM of DSPy's that the peer has not made."""
    async def aforward(self, question):
        lm = dspy.LM(dspy.settings.lm.model, **{**dspy.settings.lm.kwargs, "cache": False, "num_retries": 0})
        with dspy.context(lm=lm):
            return await dspy.Predict("question -> answer").acall(question=question)

class Typed(dspy.Module):
    """By a request of DSPy's own type."""
    async def aforward(self, question):
        from dspy.lm15 import Message, Request
        lm = dspy.settings.lm
        response = await lm.acall(Request(model=lm.model, messages=(Message.user(question),)))
        return dspy.Prediction(answer=response.text)


'''


class TracedLM(LMServer):
    """`asked`: of each request the question in it and the values of its header, in the order of the answers."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        self._connection = threading.local()
        super().__init__(answer)
        handler: Any = self._server.RequestHandlerClass
        plain, server = handler.do_POST, self

        def do_post(self: Any) -> None:
            server._connection.traceparents = self.headers.get_all("traceparent")
            server.headers = {name.lower(): value for name, value in self.headers.items()}
            plain(self)

        handler.do_POST = do_post

    def serve(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        self.asked: list[tuple[str, list[str] | None]] = []
        # Headers of the last request, by header.
        self.headers: dict[str, str] = {}

        def noted(request: dict[str, Any]) -> Answer:
            said = re.findall(r"\[\[ ## question ## \]\]\s*(\w+)", json.dumps(request).replace("\\n", "\n"))
            self.asked.append((said[-1] if said else "", self._connection.traceparents))
            return answer(request)

        super().serve(noted)


@pytest.fixture(scope="module")
def traced_lms() -> Iterator[list[TracedLM]]:
    servers: list[TracedLM] = []
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def start_lm(traced_lms: list[TracedLM]) -> Iterator[Callable[..., TracedLM]]:
    """Starts loopback LMs that note the header."""
    with reusable(traced_lms, TracedLM) as start:
        yield start


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Peer]]:
    """Starts a peer that has `host`."""
    with ExitStack() as peers:

        def start(**env: str) -> Peer:
            env = {"PYTHONPATH": f"{ROOT}:{folder}", "DSPY_BRIDGE_ALLOW_MODULES": "host", **env}
            return peers.enter_context(shared_peer(env=env))

        yield start


@pytest.fixture
def peer(start: Callable[..., Peer]) -> Peer:
    """One for most tests: LMs are given with the programs, and LiteLLM, whose import takes seconds, stays imported."""
    return start()


def qa(server: LMServer, **options: Any) -> dict[str, Any]:
    """A program that asks `server`."""
    return {**QA, "lm": {"model": "openai/stub-model", **server.options(**options)}}


def ask(question: str, **args: Any) -> dict[str, Any]:
    return {"program_id": "qa", "inputs": {"question": question}, **args}


def reply_of(peer: Peer, id: int, logged: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The reply, and what came before it; of log records, which go their own way, so many are waited for."""
    frames: list[dict[str, Any]] = []
    reply: dict[str, Any] | None = None
    while reply is None or sum("log" in frame for frame in frames) < logged:
        frame = peer.receive()
        if "success" in frame:
            reply = frame
        else:
            frames.append(frame)
    assert reply["id"] == id
    return reply, frames


# Options of an LM, and how to know the way that DSPy takes with them: its own engine has no headers.
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "its own engine": ({}, "lm15"),
    "LiteLLM": ({"extra_headers": {"X-Own": "1"}}, "DSPy"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("way", WAYS)
def test_each_execute_has_its_own_header_and_one_without_has_none(
    peer: Peer, start_lm: Any, way: str, stream: bool
) -> None:
    """At the same time, over the same connections."""
    options, agent = WAYS[way]
    server = start_lm()
    assert peer.call("create_program", qa(server, **options))["success"]
    for _again in range(2):
        server.gate.clear()
        given: list[tuple[str, dict[str, str]]] = [
            ("one", {"traceparent": FIRST}), ("two", {"traceparent": SECOND}), ("none", {})
        ]  # fmt: skip
        ids = {peer.request("execute_program", ask(name), stream=stream, **more) for name, more in given}
        for _ in ids:
            assert server.arrived.acquire(timeout=PATIENCE)
        server.gate.set()
        while ids:
            frame = peer.receive()
            if "success" in frame:
                assert frame["result"] == {"answer": "Paris"}, frame
                ids.remove(frame["id"])
    assert sorted(server.asked) == sorted([("one", [FIRST]), ("two", [SECOND]), ("none", None)] * 2)
    assert server.headers["user-agent"].startswith(agent)


@pytest.mark.litellm
def test_a_header_of_the_lms_own_gives_way_the_others_stay(peer: Peer, start_lm: Any) -> None:
    """Whatever its case, with OpenAI's client and LiteLLM's own. A call without a trace sends it."""
    server = start_lm()
    for model, key in itertools.product(("openai/x", "mistral/x"), ("headers", "extra_headers")):
        lm = {"model": model, **server.options(**{key: {"Traceparent": THIRD, "X-Own": "1"}})}
        assert peer.call("create_program", {**QA, "lm": lm})["success"]
        for envelope, wanted in (({"traceparent": FIRST}, FIRST), ({}, THIRD)):
            reply = peer.call("execute_program", ask("one"), **envelope)
            assert reply["success"], reply
            assert server.asked.pop() == ("one", [wanted]), (model, key)
            assert server.headers["x-own"] == "1"


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_hits_whatever_the_trace(peer: Peer, start_lm: Any, way: str) -> None:
    server = start_lm()
    # The key is part of what answers are kept under: no other test has asked with it.
    assert peer.call("create_program", qa(server, cache=True, api_key="sk-of-the-cache", **WAYS[way][0]))["success"]
    for envelope in ({"traceparent": FIRST}, {"traceparent": SECOND}, {}):
        reply = peer.call("execute_program", ask("one"), meta=True, **envelope)
        assert reply["result"] == {"answer": "Paris"}
        assert reply["meta"]["cache_hits"] == ("traceparent" not in envelope or envelope["traceparent"] == SECOND)
    assert server.asked == [("one", [FIRST])]


def test_so_has_every_try(peer: Peer, start_lm: Any) -> None:
    """After a failure of the LM's, in the adapter's other format, of a best of n, a refinement and of two steps."""
    busy = (503, {"error": {"message": "busy", "type": "error", "code": None}})
    server = start_lm(script(busy, "Paris, I think.", '{"answer": "Paris"}'))
    assert peer.call("create_program", qa(server, num_retries=1))["success"]
    assert peer.call("execute_program", ask("one"), traceparent=FIRST)["success"]
    assert server.asked == [("one", [FIRST])] * 3
    advice = chat(answer="Paris", discussion="None.", advice="{}")
    reward = {"n": 2, "reward": {"field": "answer", "equals": "Rome"}}
    programs: tuple[tuple[dict[str, Any], int], ...] = (
        ({"program_type": "best_of_n", "options": reward}, 2),
        ({"program_type": "refine", "options": reward}, 3),
        ({"adapter": {"name": "two_step", "extraction_model": {"model": "openai/x"}}}, 2),
    )
    for program, calls in programs:
        server = start_lm(advice)
        if "adapter" in program:
            program["adapter"]["extraction_model"] |= server.options()
        assert peer.call("create_program", {**qa(server), **program})["success"]
        assert peer.call("execute_program", ask("one"), traceparent=FIRST)["success"]
        assert [traceparents for _, traceparents in server.asked] == [[FIRST]] * calls, program


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("module", ["Sync", "Parallel", "OwnLM", "Typed"])
def test_modules_of_the_hosts_own_have_it(peer: Peer, start_lm: Any, module: str, way: str) -> None:
    """In a thread, in threads that DSPy starts there, with LMs of their own, by requests of DSPy's own type."""
    server = start_lm()
    assert peer.call("create_program", {**qa(server, **WAYS[way][0]), "program_type": f"host:{module}"})["success"]
    for envelope in ({"traceparent": FIRST}, {}):
        reply = peer.call("execute_program", ask("one"), **envelope)
        assert "Paris" in reply["result"]["answer"], reply
        wanted = [FIRST] if envelope else None
        assert [traceparents for _, traceparents in server.asked] == [wanted] * (2 if module == "Parallel" else 1)
        server.asked.clear()


LOGGED = [
    ("host:Logs", FIRST), ("host:LogsInThread", SECOND), ("host:Logs", None), ("host:LogsInThread", None)
]  # fmt: skip


def test_log_frames_carry_it_and_those_of_others_do_not(start: Callable[..., Peer]) -> None:
    """Records of user code, on the loop and in threads, and of the peer."""
    peer = start(DSPY_BRIDGE_LM="offline/echo", DSPY_BRIDGE_LOG_FRAMES="1")
    for program, traceparent in LOGGED:
        assert peer.call("create_program", {**QA, "program_type": program})["success"]
        envelope = {} if traceparent is None else {"traceparent": traceparent}
        reply, frames = reply_of(peer, peer.request("execute_program", ask("one"), **envelope), 1)
        assert reply["result"] == {"answer": str(traceparent)}, "the module sees it, too"
        said = {"level": "warning", "logger": "host", "message": "working on one", **envelope}
        assert frames == [{"log": said}]
    assert peer.call("create_program", {**QA, "program_type": "host:Parallel"})["success"]
    reply, frames = reply_of(peer, peer.request("execute_program", ask("one"), traceparent=THIRD), 2)
    assert [frame["log"].get("traceparent") for frame in frames] == [THIRD] * 2
