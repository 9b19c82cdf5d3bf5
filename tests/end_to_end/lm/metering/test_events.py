"""`"lm_events": true`: the LM calls of a run without their contents."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import pytest
from conftest import BY_LITELLM, lm_env
from lm_server import KEY, Answer, Ended, chat, completion, script
from peer import PATIENCE, ROOT
from shared_peers import shared_peer

from dspy_bridge.lm.metering.lm_events import MOST

ASK = {"program_id": "qa", "inputs": {"question": "Why is the sky blue?"}}
TIMES = {"started_ms", "wait_ms", "duration_ms", "first_chunk_ms"}


def events(reply: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = reply["meta"]["lm_events"]
    # Those that are not finished are measured a moment after the whole.
    whole = reply["meta"]["duration_ms"] + (50 if reply.get("error_type") else 0.01)
    assert all(0 <= event["started_ms"] + event["duration_ms"] <= whole for event in found)
    return found


def without_times(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in TIMES}


@pytest.mark.parametrize("way", [{}, BY_LITELLM], ids=["own", "litellm"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_call_has_its_model_tokens_and_times_and_no_contents(make: Any, stream: bool, way: dict[str, Any]) -> None:
    peer, _ = make(chat(answer="Rayleigh"), way)
    peer.request("execute_program", ASK, lm_events=True, stream=stream)
    while "success" not in (reply := peer.receive()):
        assert "lm_events" not in json.dumps(reply)
    (event,) = events(reply)
    assert event["duration_ms"] > 0 and event["started_ms"] > 0 and event["wait_ms"] == 0
    assert 0 < event["first_chunk_ms"] < event["duration_ms"] if stream else event["first_chunk_ms"] is None
    # LiteLLM makes 0 of what nobody tells.
    assert event["reasoning_tokens"] in (None, 0)
    assert without_times({**event, "reasoning_tokens": None}) == {
        "model": "openai/stub",
        "input_tokens": 11,
        "output_tokens": 7,
        "cached_tokens": None,
        "reasoning_tokens": None,
        "cost_usd": None,
        "cached": False,
        "finish_reason": "stop",
        "error_type": None,
    }
    assert reply["meta"]["lm_calls"] == 1, "the rest of meta is there, too"
    assert not re.search("sky|Rayleigh", json.dumps(reply["meta"]))


@pytest.mark.parametrize("way", [{}, BY_LITELLM], ids=["own", "litellm"])
@pytest.mark.parametrize("header", [{"Retry-After": "1"}, {}], ids=["told", "not told"])
def test_what_a_call_waits_after_a_refusal_is_not_its_duration(
    make: Any, way: dict[str, Any], header: dict[str, str]
) -> None:
    """Without a header DSPy waits a second, too."""
    refusal = 429, {"error": {"message": "slow down"}}, header
    key = f"sk-events-{len(way)}-{len(header)}"
    peer, _ = make(script(refusal, chat(answer="a")), {"num_retries": 2, "api_key": key, **way})
    reply = peer.call("execute_program", ASK, lm_events=True)
    (event,) = events(reply)
    assert 900 < event["wait_ms"] == reply["meta"]["wait_ms"]
    assert event["started_ms"] + event["wait_ms"] + event["duration_ms"] <= reply["meta"]["duration_ms"] + 0.01
    assert peer.call("get_stats")["result"]["lm_waiting"] == 0


def test_a_call_that_waits_for_a_limit_is_counted_and_its_wait_is_told(make: Any) -> None:
    peer, server = make(chat(answer="a"), {"max_in_flight": 1, "api_key": "sk-events-in-flight"})
    server.gate.clear()
    first = peer.request("execute_program", ASK, lm_events=True)
    assert server.arrived.acquire(timeout=PATIENCE)
    second = peer.request("execute_program", ASK, lm_events=True)
    while peer.call("get_stats")["result"]["lm_waiting"] == 0:
        pass
    began = time.monotonic()
    assert peer.call("ping")["success"]
    least = (time.monotonic() - began) * 1000
    peer.send({"cancel": second})
    (event,) = events(reply := peer.receive())
    assert (reply["id"], event["error_type"]) == (second, "unfinished")
    assert least < event["wait_ms"] == reply["meta"]["wait_ms"]
    while peer.call("get_stats")["result"]["lm_waiting"] == 1:
        pass
    server.gate.set()
    (event,) = events(reply := peer.receive())
    assert reply["id"] == first and event["wait_ms"] < event["duration_ms"]


def test_the_page_has_a_row_for_each_key(make: Any) -> None:
    peer, _ = make(chat(answer="a"))
    (event,) = events(peer.call("execute_program", ASK, lm_events=True))
    page = (ROOT / "docs" / "protocol.md").read_text()
    (section,) = re.findall(r"^### LM events\n(.*?)^##", page, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(event)
    (example,) = re.findall(r"^```json\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert json.loads(example)["lm_events"][0].keys() == event.keys()
    assert f"the first {MOST:,}" in section


def test_a_call_that_fails_has_the_class_of_its_error_and_no_text(make: Any) -> None:
    peer, _ = make((400, {"error": {"message": f"your key {KEY} is wrong", "type": "error"}}))
    reply = peer.call("execute_program", ASK, lm_events=True)
    (event,) = events(reply)
    assert reply["error_type"] == "lm_error" and event["error_type"] == "LMInvalidRequestError"
    assert (event["finish_reason"], event["input_tokens"], event["output_tokens"]) == (None, 0, 0)
    assert "wrong" not in json.dumps(reply["meta"]) and KEY not in json.dumps(reply)
    peer, _ = make(Ended("[[ ## answer ## ]]\nhalf an ans"), {"max_tokens": 30})
    (event,) = events(peer.call("execute_program", ASK, lm_events=True))
    assert (event["error_type"], event["finish_reason"], event["output_tokens"]) == ("CutOff", "length", 7)


@pytest.mark.parametrize("end", ["timeout", "cancelled"])
def test_a_call_under_way_is_unfinished(make: Any, end: str) -> None:
    waiting = threading.Event()

    def answer(request: dict[str, Any]) -> Answer:
        waiting.wait(PATIENCE)
        return "late"

    peer, server = make(answer)
    envelope = {"timeout_ms": 500} if end == "timeout" else {}
    id = peer.request("execute_program", ASK, lm_events=True, **envelope)
    assert server.arrived.acquire(timeout=PATIENCE)
    if end == "cancelled":
        peer.send({"cancel": id})
    reply = peer.receive()
    waiting.set()
    (event,) = events(reply)
    assert (reply["error_type"], event["error_type"], event["finish_reason"]) == (end, "unfinished", None)


@pytest.mark.parametrize("fails", [False, True], ids=["a result", "an error"])
def test_a_reply_that_they_would_make_too_long_comes_without_them(start_lm: Any, fails: bool) -> None:
    body = completion("m", "no format" if fails else chat(answer="a"))
    body["choices"][0]["finish_reason"] = "stop"
    server = start_lm((200, body))
    with shared_peer(env={**lm_env(server), "DSPY_BRIDGE_MAX_FRAME_BYTES": "700"}) as peer:
        peer.call("create_program", {"id": "qa", "signature": "question -> answer"})
        many = {**ASK, "attempts": 3} if fails else {**ASK, "inputs": [{"question": str(n)} for n in range(3)]}
        reply = peer.call("execute_program", many, lm_events=True, history=True)
        assert reply["success"] is not fails and reply.get("error_type") in (None, "output_invalid"), reply
        assert (reply["meta"]["lm_events"], reply["meta"]["lm_calls"] >= 3) == ([], True)
        assert reply["meta"]["history"] == [{"omitted": reply["meta"]["lm_calls"]}]
