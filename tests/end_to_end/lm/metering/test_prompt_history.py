"""`"history": true`: the LM calls of a run as its reply shows them. Nothing else shows them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import BY_LITELLM, lm_env
from lm_server import KEY, Answer, chat, script
from peer import PATIENCE, ROOT, Peer
from shared_peers import shared_peer

ASK = {"program_id": "qa", "inputs": {"question": "Why is the sky blue?"}}
KEYS = {"model", "messages", "outputs", "finish_reason", "usage", "duration_ms", "cached", "error"}
HOST = """
import dspy

class Direct(dspy.Module):
    def forward(self, question):
        return dspy.Prediction(answer=dspy.settings.lm(question)[0])

class Typed(dspy.Module):
    async def aforward(self, question):
        from dspy.lm15 import Message, Request
        lm = dspy.settings.lm
        response = await lm.acall(Request(model=lm.model, messages=(Message.user(question),)))
        return dspy.Prediction(answer=response.text)
"""


def history(reply: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = reply["meta"]["history"]
    assert all(entry.keys() in (KEYS, {"omitted"}) for entry in found)
    return found


@pytest.mark.parametrize("way", [{}, BY_LITELLM], ids=["own", "litellm"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_call_is_shown_as_the_lm_had_it(make: Any, stream: bool, way: dict[str, Any]) -> None:
    peer, server = make(chat(answer="Rayleigh"), way)
    peer.request("execute_program", ASK, history=True, stream=stream)
    while "success" not in (reply := peer.receive()):
        assert "history" not in json.dumps(reply)
    (entry,) = history(reply)
    assert entry["messages"] == server.requests[0]["messages"]
    assert entry["outputs"] == [chat(answer="Rayleigh")]
    assert (entry["model"], entry["finish_reason"], entry["cached"], entry["error"]) == (
        "openai/stub",
        "stop",
        False,
        None,
    )
    assert entry["usage"]["completion_tokens"] == 7 and 0 < entry["duration_ms"] <= reply["meta"]["duration_ms"]
    assert reply["meta"]["lm_calls"] == 1, "the rest of meta is there, too"


def test_all_calls_are_there_in_their_order(make: Any) -> None:
    answers = script(
        chat(next_thought="t", next_tool_name="look", next_tool_args="{}"),
        chat(next_thought="t", next_tool_name="finish", next_tool_args="{}"),
        "no format",
        '{"reasoning": "r", "answer": "a"}',
    )
    peer, server = make(answers, program_type="react", tools=[{"name": "look"}])
    peer.request("execute_program", ASK, history=True)
    call = peer.receive()["tool_call"]
    peer.send({"tool_result": {"call_id": call["call_id"], "success": True, "result": "found"}})
    found = history(peer.receive())
    assert [entry["messages"] for entry in found] == [request["messages"] for request in server.requests]
    assert found[2]["outputs"] == ["no format"] and found[2]["error"] is None


def test_a_call_that_fails_is_there_with_its_error(make: Any) -> None:
    peer, server = make((400, {"error": {"message": f"your key {KEY}\nis wrong", "type": "error"}}))
    reply = peer.call("execute_program", ASK, history=True)
    (entry,) = history(reply)
    assert reply["error_type"] == "lm_error"
    assert entry["error"].startswith("LMInvalidRequestError: ") and "your key [redacted] is wrong" in entry["error"]
    assert (entry["outputs"], entry["finish_reason"], entry["usage"]) == (None, None, {})
    assert entry["messages"] == server.requests[0]["messages"]


@pytest.mark.parametrize("end", ["timeout", "cancelled"])
def test_a_call_under_way_is_shown_as_far_as_it_is(make: Any, end: str) -> None:
    waiting = threading.Event()

    def answer(request: dict[str, Any]) -> Answer:
        if "JSON object" not in str(request["messages"]):
            return "no format"
        waiting.wait(PATIENCE)
        return "late"

    peer, server = make(answer)
    id = peer.request("execute_program", ASK, history=True, **({"timeout_ms": 700} if end == "timeout" else {}))
    for _ in range(2):
        assert server.arrived.acquire(timeout=PATIENCE)
    if end == "cancelled":
        peer.send({"cancel": id})
    reply = peer.receive()
    waiting.set()
    first, second = history(reply)
    assert reply["error_type"] == end and first["outputs"] == ["no format"]
    assert second["messages"] == server.requests[1]["messages"]
    assert (second["outputs"], second["error"]) == (None, "not finished") and second["duration_ms"] > 0


@pytest.mark.parametrize("module", ["Direct", "Typed"])
def test_modules_of_users_ask_in_other_forms(folder: Path, start_lm: Any, module: str) -> None:
    """A plain string, in a thread; a request of DSPy's."""
    env = {**lm_env(start_lm("blue")), "PYTHONPATH": f"{ROOT}:{folder}", "DSPY_BRIDGE_ALLOW_MODULES": "host"}
    with shared_peer(env=env) as peer:
        create = {"id": "qa", "signature": "question -> answer", "program_type": f"host:{module}"}
        assert peer.call("create_program", create)["success"]
        reply = peer.call("execute_program", ASK, history=True)
        assert reply["result"] == {"answer": "blue"}, reply
        (entry,) = history(reply)
        assert "Why is the sky blue?" in str(entry["messages"]) and "'user'" in str(entry["messages"])
        assert "blue" in str(entry["outputs"]) and entry["finish_reason"] == "stop"


@pytest.mark.parametrize("fails", [False, True], ids=["a result", "an error"])
def test_a_reply_that_it_would_make_too_long_comes_without_it(start_lm: Any, fails: bool) -> None:
    server = start_lm("no format" if fails else chat(answer="a"))
    with shared_peer(env={**lm_env(server), "DSPY_BRIDGE_MAX_FRAME_BYTES": "2400"}) as peer:
        peer.call("create_program", {"id": "qa", "signature": "question -> answer"})
        inputs = {"question": "why " * 400}
        reply = peer.call("execute_program", {**ASK, "inputs": inputs}, history=True)
        assert reply["success"] is not fails and reply.get("error_type") in (None, "output_invalid")
        assert reply["meta"]["history"] == [{"omitted": reply["meta"]["lm_calls"]}]


HEADERS = {"X-Token": "planted-header-2222", "Authorization": "Bearer planted-bearer-3333"}


# With headers of one's own DSPy calls LiteLLM.
@pytest.mark.parametrize(
    ("way", "log_level"),
    [
        pytest.param({}, "info", id="own"),
        pytest.param({**BY_LITELLM, "extra_headers": HEADERS}, "debug", id="litellm", marks=pytest.mark.slow),
    ],
)
def test_planted_secrets_are_nowhere(start_lm: Any, way: dict[str, Any], log_level: str) -> None:
    """Keys are neither in a history nor in the log; prompts and answers are in no log."""
    planted = {"api_key": "planted-key-1111", **way}
    told = f"{planted['api_key']} sk-planted4444"
    if "extra_headers" in way:
        told += " planted-header-2222 planted-bearer-3333"

    def answer(request: dict[str, Any]) -> Answer:
        if "refuse" in str(request["messages"]):
            return 400, {"error": {"message": f"bad {told}", "type": "error"}}
        return chat(answer=f"marker-of-an-answer {told}") if "say" in str(request["messages"]) else f"unfit {told}"

    server = start_lm(answer)
    env = {**lm_env(server, **planted), "DSPY_BRIDGE_LOG_LEVEL": log_level}
    with Peer(env=env) as peer:
        peer.call("create_program", {"id": "qa", "signature": "question -> answer"})
        shown = ""
        for what, error_type in (("say", None), ("refuse", "lm_error"), ("unfit", "output_invalid")):
            inputs = {"question": f"{what} marker-of-a-prompt {told}"}
            reply = peer.call("execute_program", {**ASK, "inputs": inputs}, history=True)
            assert reply.get("error_type") == error_type, reply
            assert len(history(reply)) >= 1 and "marker-of-a-prompt" in str(history(reply))
            shown += json.dumps(reply["meta"])
        log = peer.finish()[2]
    assert "marker-of-an-answer" in shown and "[redacted]" in shown
    for text in (shown, log):
        assert "planted" not in text
    assert "marker-of" not in log and "history" not in log
