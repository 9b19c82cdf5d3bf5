"""`DSPY_BRIDGE_INIT`: callbacks and LMs of user code, set up with `dspy.configure`, apply to every run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BY_LITELLM, lm_env
from lm_server import LMServer, chat
from peer import ROOT, Peer

HOST = """
import dspy, json, os, sys
from dspy.utils.callback import BaseCallback

class Counter(BaseCallback):
    def __init__(self):
        self.counts = {}
    def count(self, what):
        self.counts[what] = self.counts.get(what, 0) + 1
        with open(os.environ["RECORD"], "w") as file:
            json.dump(self.counts, file)
    def on_lm_start(self, call_id, instance, inputs):
        self.count("lm_start")
    def on_lm_end(self, call_id, outputs, exception=None):
        self.count("lm_end" if exception is None else "lm_failed")
    def on_module_start(self, call_id, instance, inputs):
        self.count(type(instance).__name__)

def counting():
    dspy.configure(callbacks=[Counter()])

def own_lm():
    options = json.loads(os.environ["OWN"])
    dspy.configure(lm=dspy.LM("openai/hosts", **options), track_usage=True)

def noted():
    with open(os.environ["RECORD"], "a") as file:
        file.write("called\\n")

def no_lm():
    noted()
    dspy.configure(lm=None)

def raises():
    noted()
    raise RuntimeError("no tracing here")

def leaves():
    sys.exit(3)

ERRORS = {"value": ValueError, "type": TypeError, "attribute": AttributeError, "overflow": OverflowError}

def fail(text):
    for name, kind in ERRORS.items():
        if name in text:
            raise kind("a defect with " + text)


class FailingAdapter(dspy.ChatAdapter):
    def format(self, signature, demos, inputs):
        return [{"role": "user", "content": inputs["question"]}]
    def parse(self, signature, completion):
        fail(completion)
        return {"answer": completion}

def failing_adapter():
    dspy.configure(adapter=FailingAdapter())
"""

QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"program_id": "qa", "inputs": {"question": "Where?"}}
COMPARE = {**QA, "id": "mcc", "program_type": "multi_chain_comparison", "options": {"M": 1}}
COMPARED = {"program_id": "mcc", "inputs": {"question": "?", "completions": [{"reasoning": "r", "answer": "a"}]}}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    """Starts a peer with an init of `host`."""
    (tmp_path / "host.py").write_text(HOST)
    peers = []

    def start(init: str, **env: str) -> Peer:
        path = f"{ROOT}:{tmp_path}"
        given = {"DSPY_BRIDGE_INIT": f"host:{init}", "PYTHONPATH": path, "RECORD": str(tmp_path / "record"), **env}
        peers.append(Peer(env=given))
        return peers[-1]

    yield start
    for peer in peers:
        peer.__exit__()


def read(peer: Peer, id: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    frames = []
    while "stream" in (frame := peer.receive()):
        frames.append(frame["stream"])
    assert frame["id"] == id
    return frames, frame


def test_a_callback_hears_of_every_lm_call(start: Callable[..., Peer], start_lm: Any, tmp_path: Path) -> None:
    """Plain, streamed, with meta, in a thread, in a batch, from the cache, with `offline/echo`, failing."""
    server: LMServer = start_lm(lambda request: (
        (400, {"error": {"message": "no", "type": "error", "code": None}})
        if "fail" in str(request["messages"]) else chat(answer="Paris", rationale="r")
    ))  # fmt: skip
    peer = start("counting", **lm_env(server))
    assert peer.call("create_program", QA)["success"] and peer.call("create_program", COMPARE)["success"]
    record = tmp_path / "record"
    calls = 0
    for args, envelope, more in (
        (ASK, {}, 1),
        (ASK, {"stream": True}, 1),
        (ASK, {"meta": True}, 1),
        (ASK, {"stream": True, "meta": True}, 1),
        (COMPARED, {}, 1),
        (COMPARED, {"stream": True, "meta": True}, 1),
        ({**ASK, "inputs": [{"question": "a"}] * 3}, {"meta": True, "stream": True}, 3),
        ({**ASK, "lm": {"model": "offline/echo"}}, {"stream": True, "meta": True}, 1),
        ({**ASK, "lm": {"model": "openai/x", **server.options(cache=True)}}, {}, 1),
        ({**ASK, "lm": {"model": "openai/x", **server.options(cache=True)}}, {"stream": True}, 1),
    ):
        calls += more
        _, reply = read(peer, peer.request("execute_program", args, **envelope))
        assert reply["success"], reply
        assert reply.get("meta", {"lm_calls": more})["lm_calls"] == more
        counts = json.loads(record.read_text())
        assert (counts["lm_start"], counts["lm_end"]) == (calls, calls), (args, envelope)
    assert counts["MultiChainComparison"] == 2
    assert peer.call("execute_program", {**ASK, "inputs": {"question": "fail"}}, meta=True)["error_type"] == "lm_error"
    assert json.loads(record.read_text())["lm_failed"] == 1


def test_an_lm_of_user_code_answers_and_streams(start: Callable[..., Peer], start_lm: Any) -> None:
    """In a thread it cannot stream: its answer is sent as a whole."""
    server = start_lm(chat(answer="Paris, in France", rationale="It is known."))
    peer = start("own_lm", OWN=json.dumps(server.options()))
    assert peer.call("create_program", QA)["success"] and peer.call("create_program", COMPARE)["success"]
    frames, reply = read(peer, peer.request("execute_program", ASK, stream=True, meta=True))
    assert reply["result"] == {"answer": "Paris, in France"} and len(frames) > 3
    assert reply["meta"]["lm_usage"]["openai/hosts"]["completion_tokens"] == 7
    frames, reply = read(peer, peer.request("execute_program", COMPARED, stream=True, meta=True))
    assert reply["result"] == {"answer": "Paris, in France", "rationale": "It is known."}, reply
    assert {frame["field"]: frame["chunk"] for frame in frames} == reply["result"]
    assert reply["meta"]["lm_calls"] == 1


def test_it_is_called_once_before_the_first_program(start: Callable[..., Peer], tmp_path: Path) -> None:
    peer = start("no_lm", DSPY_BRIDGE_LM="offline/echo")
    assert peer.call("ping")["success"] and not (tmp_path / "record").exists()
    for id in ("qa", "other"):
        assert peer.call("create_program", {**QA, "id": id})["success"]
    assert (tmp_path / "record").read_text() == "called\n"
    assert peer.call("execute_program", ASK)["error_type"] == "lm_not_configured", "what init configures counts"


@pytest.mark.parametrize(("init", "text"), [("raises", "no tracing here"), ("leaves", "SystemExit"), ("gone", "gone")])
def test_one_that_fails_stops_nothing_but_programs(start: Callable[..., Peer], init: str, text: str) -> None:
    """Also the runs that wait for the program; once its create has failed there is none."""
    peer = start(init, DSPY_BRIDGE_LM="offline/echo")
    create, execute = peer.request("create_program", QA), peer.request("execute_program", ASK)
    many = peer.request("execute_program", {**ASK, "inputs": [{"question": "a"}]})
    replies = peer.receive_all(3)
    for id in (create, execute, many):
        error = replies[id]["error"]
        assert replies[id]["error_type"] == "internal" and "DSPY_BRIDGE_INIT" in error and text in error
    assert peer.call("execute_program", ASK)["error_type"] == "program_not_found"
    assert peer.call("ping")["success"] and peer.call("get_stats")["result"]["in_flight"] == 0
    log = peer.finish()[2]
    assert log.count(f"internal error {error.split()[-1]}") == 1 and "Traceback" in log


def test_a_set_up_that_fails_is_tried_again_by_the_next_create(start: Callable[..., Peer], tmp_path: Path) -> None:
    peer = start("raises", DSPY_BRIDGE_LM="offline/echo")
    for _ in range(3):
        assert "no tracing here" in peer.call("create_program", QA)["error"]
    assert len((tmp_path / "record").read_text().splitlines()) == 3


DEFECTS = ("value", "type", "attribute", "overflow")


def test_a_defect_of_an_adapter_is_no_argument_error_whatever_was_given(start: Callable[..., Peer]) -> None:
    """Its text holds what an LM wrote: it stays here, the log has the traceback."""
    peer = start("failing_adapter", DSPY_BRIDGE_LM="offline/echo")
    assert peer.call("create_program", QA)["success"]
    for word in DEFECTS:
        for given in ({}, {"config": {"temperature": 0.5}}, {"lm": {"model": "offline/echo", "temperature": 0.5}}):
            reply = peer.call("execute_program", {**ASK, **given, "inputs": {"question": f"{word} private"}})
            assert reply["error_type"] == "internal" and "private" not in reply["error"], (word, given, reply)
            reference = reply["error"].split()[-1]
    reply = peer.call("execute_program", {**ASK, "config": {"stop": 5}})
    assert reply["error_type"] == "invalid_args" and reply["error"].startswith("config: ")
    _, _, log = peer.finish()
    assert f"internal error {reference}" in log and log.count("host.py") >= 12 and "private" not in log


@pytest.mark.slow
def test_an_lm_of_user_code_that_litellm_serves_is_guarded_as_any_other(
    start: Callable[..., Peer], start_lm: Any
) -> None:
    """On the event loop and in a thread: it follows no redirect."""
    other = start_lm()
    redirect = (307, {}, {"Location": f"{other.url}/chat/completions"})
    server = start_lm(redirect)
    options = {**server.options(num_retries=0), **BY_LITELLM}
    peer = start("own_lm", OWN=json.dumps(options))
    assert peer.call("create_program", QA)["success"] and peer.call("create_program", COMPARE)["success"]
    for args in (ASK, COMPARED):
        reply = peer.call("execute_program", args)
        assert reply["error_type"] == "lm_error" and not reply["retryable"] and "a redirect (307)" in reply["error"]
    assert len(server.requests) == 2 and other.requests == []
    server.serve(lambda _: chat(answer="Paris", rationale="r"))
    assert peer.call("execute_program", ASK)["success"] and peer.call("execute_program", COMPARED)["success"]
