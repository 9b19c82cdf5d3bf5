"""What a reply tells of the LM calls of its run: `meta`, with `"lm_events": true` and `"history": true`."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import BY_LITELLM, lm_env
from lm_server import KEY, Answer, Ended, chat, script
from peer import PATIENCE, ROOT, Peer
from shared_peers import shared_peer

from dspy_bridge.lm.metering.meter import MOST

ASK = {"program_id": "qa", "inputs": {"question": "Why is the sky blue?"}}
ALL = {"meta": True, "history": True, "lm_events": True}
PRICED = "openai/gpt-4o-mini"
# 11 tokens of prompt and 7 of answer, at 0.15 and 0.60 dollars a million.
COST = pytest.approx(11 * 0.15e-6 + 7 * 0.6e-6)
OF_ENTRIES = {"model", "messages", "outputs", "finish_reason", "usage", "duration_ms", "cached", "replayed", "error"}
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


def views(reply: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The meta, its events and its history."""
    meta = reply["meta"]
    assert all(entry.keys() in (OF_ENTRIES, {"omitted"}) for entry in meta["history"])
    # Those that are not finished are measured a moment after the whole.
    whole = meta["duration_ms"] + (50 if reply.get("error_type") else 0.01)
    assert all(0 <= event["started_ms"] + event["duration_ms"] <= whole for event in meta["lm_events"])
    return meta, meta["lm_events"], meta["history"]


@pytest.mark.parametrize("way", [{}, BY_LITELLM], ids=["own", "litellm"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_call_has_what_it_took_and_in_the_history_alone_its_contents(
    make: Any, stream: bool, way: dict[str, Any]
) -> None:
    peer, server = make(chat(answer="Rayleigh"), {"model": PRICED, **way})
    peer.request("execute_program", ASK, stream=stream, **ALL)
    while "success" not in (reply := peer.receive()):
        assert reply.keys() == {"id", "stream"}
    meta, (event,), (entry,) = views(reply)
    assert (meta["finish_reasons"], meta["fallbacks"], meta["lm_calls"], meta["cost_usd"]) == (["stop"], 0, 1, COST)
    assert meta["lm_usage"][PRICED]["completion_tokens"] == 7 and 0 <= meta["queue_ms"] < meta["duration_ms"]
    assert event["duration_ms"] > 0 and event["started_ms"] > 0 and event["wait_ms"] == 0
    told = stream and not way
    assert 0 < event["first_chunk_ms"] < event["duration_ms"] if told else event["first_chunk_ms"] is None
    shown = {"model": PRICED, "input_tokens": 11, "output_tokens": 7, "cached_tokens": None, "cost_usd": COST}
    shown |= {"cached": False, "finish_reason": "stop", "error_type": None}
    assert {name: event[name] for name in shown} == shown
    assert not re.search("sky|Rayleigh", json.dumps({**meta, "history": None}))
    assert entry["messages"] == server.requests[0]["messages"] and entry["outputs"] == [chat(answer="Rayleigh")]
    assert (entry["model"], entry["finish_reason"], entry["cached"], entry["error"]) == (PRICED, "stop", False, None)
    assert entry["usage"]["completion_tokens"] == 7 and 0 < entry["duration_ms"] <= meta["duration_ms"]


def test_each_view_is_there_if_it_is_asked_for(make: Any) -> None:
    peer, _ = make(chat(answer="a"))
    assert "meta" not in peer.call("execute_program", ASK, history=False, lm_events=False)
    assert not {"history", "lm_events"} & peer.call("execute_program", ASK, meta=True)["meta"].keys()
    meta, events, history = views(peer.call("execute_program", {**ASK, "inputs": {}}, **ALL))
    assert (meta["lm_calls"], meta["finish_reasons"], meta["cost_usd"], events, history) == (0, [], 0.0, [], [])


def test_the_page_has_a_row_for_each_key_of_an_event(make: Any) -> None:
    peer, _ = make(chat(answer="a"))
    (event,) = peer.call("execute_program", ASK, lm_events=True)["meta"]["lm_events"]
    page = (ROOT / "docs" / "protocol.md").read_text()
    (section,) = re.findall(r"^### LM events\n(.*?)^##", page, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(event)
    (example,) = re.findall(r"^```json\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert json.loads(example)["lm_events"][0].keys() == event.keys()
    assert f"the first {MOST:,}" in section


@pytest.mark.parametrize("adapter", ["chat", "xml"])
def test_a_second_call_in_json_is_a_fallback(make: Any, adapter: str) -> None:
    peer, server = make(script("no format", '{"answer": "a"}'), adapter=adapter)
    meta, _, history = views(peer.call("execute_program", ASK, **ALL))
    assert (meta["fallbacks"], meta["lm_calls"]) == (1, 2)
    assert [entry["messages"] for entry in history] == [request["messages"] for request in server.requests]
    assert history[0]["outputs"] == ["no format"] and history[0]["error"] is None


def test_an_answer_without_the_schema_that_the_lm_could_have_is_a_fallback(make: Any) -> None:
    """The provider takes no free-form maps in a schema, so DSPy asks for any JSON object."""
    maps = "question -> answer: dict[str, int]"
    for answer, lm, signature, fallbacks, kind in (
        ('{"answer": {"a": 1}}', {}, maps, 1, "json_object"),
        ('{"answer": 1}', {}, "question -> answer: int", 0, "json_schema"),
        # An LM that has no schemas to begin with.
        ('{"answer": {"a": 1}}', {"model": "openai/of-my-own"}, maps, 0, None),
    ):
        peer, server = make(answer, lm, adapter="json", signature=signature)
        meta = peer.call("execute_program", ASK, meta=True)["meta"]
        assert (meta["lm_calls"], meta["fallbacks"]) == (1, fallbacks)
        assert server.requests[0].get("response_format", {}).get("type") == kind


def test_a_cached_answer_costs_nothing_and_without_the_price_of_one_call_there_is_none(make: Any) -> None:
    peer, _ = make(chat(answer="Paris"), {"cache": True, "user": "costs"})
    for hits, cost in ((0, COST), (1, 0.0)):
        meta = peer.call("execute_program", ASK, meta=True)["meta"]
        assert (meta["cache_hits"], meta["finish_reasons"], meta["cost_usd"]) == (hits, ["stop"], cost)
    peer, server = make(chat(answer="a"))
    unpriced = {"model": "openai/of-my-own", **server.options()}
    peer.call("create_program", {"id": "qa", "signature": "question -> answer", "adapter": {
        "name": "two_step", "extraction_model": unpriced}})  # fmt: skip
    meta = peer.call("execute_program", ASK, meta=True)["meta"]
    assert (meta["lm_calls"], meta["cost_usd"]) == (2, None)


def test_a_call_that_fails_has_its_error_and_costs_nothing(make: Any) -> None:
    """The answer to an earlier call of the run counts."""
    refused = 400, {"error": {"message": f"your key {KEY}\nis wrong", "type": "error"}}
    peer, _ = make(script("no format", refused))
    reply = peer.call("execute_program", ASK, **ALL)
    meta, events, history = views(reply)
    assert reply["error_type"] == "lm_error" and KEY not in json.dumps(reply)
    assert (meta["finish_reasons"], meta["cost_usd"]) == (["stop", None], COST)
    assert meta["lm_usage"][PRICED]["completion_tokens"] == 7
    assert [event["error_type"] for event in events] == [None, "LMInvalidRequestError"]
    assert (events[1]["finish_reason"], events[1]["input_tokens"], events[1]["output_tokens"]) == (None, 0, 0)
    assert (history[1]["outputs"], history[1]["finish_reason"], history[1]["usage"]) == (None, None, {})
    assert "your key [redacted] is wrong" in history[1]["error"] and "wrong" not in json.dumps(events)
    peer, _ = make(Ended("[[ ## answer ## ]]\nhalf an ans"), {"max_tokens": 30})
    _, (event,), _ = views(peer.call("execute_program", ASK, **ALL))
    assert (event["error_type"], event["finish_reason"], event["output_tokens"]) == ("CutOff", "length", 7)


@pytest.mark.parametrize("end", ["timeout", "cancelled"])
def test_a_run_that_is_stopped_tells_its_calls_up_to_then(make: Any, end: str) -> None:
    waiting = threading.Event()

    def answer(request: dict[str, Any]) -> Answer:
        if "JSON object" not in str(request["messages"]):
            return "no format"
        waiting.wait(PATIENCE)
        return "late"

    peer, server = make(answer)
    id = peer.request("execute_program", ASK, **ALL, **({"timeout_ms": 700} if end == "timeout" else {}))
    for _ in range(2):
        assert server.arrived.acquire(timeout=PATIENCE)
    if end == "cancelled":
        peer.send({"cancel": id})
    reply = peer.receive()
    waiting.set()
    meta, events, history = views(reply)
    assert reply["error_type"] == end
    assert (meta["finish_reasons"], meta["fallbacks"]) == (["stop", None], 1)
    assert meta["cost_usd"] == COST, "what is under way is not known to be billed"
    assert (events[1]["error_type"], events[1]["finish_reason"]) == ("unfinished", None)
    assert history[0]["outputs"] == ["no format"] and history[1]["messages"] == server.requests[1]["messages"]
    assert (history[1]["outputs"], history[1]["error"]) == (None, "not finished") and history[1]["duration_ms"] > 0


@pytest.mark.parametrize("way", [{}, BY_LITELLM], ids=["own", "litellm"])
@pytest.mark.parametrize("header", [{"Retry-After": "1"}, {}], ids=["told", "not told"])
def test_what_a_call_waits_after_a_refusal_is_not_its_duration(
    make: Any, way: dict[str, Any], header: dict[str, str]
) -> None:
    """Without a header DSPy waits a second, too."""
    refusal = 429, {"error": {"message": "slow down"}}, header
    key = f"sk-events-{len(way)}-{len(header)}"
    peer, _ = make(script(refusal, chat(answer="a")), {"num_retries": 2, "api_key": key, **way})
    meta, (event,), _ = views(peer.call("execute_program", ASK, **ALL))
    assert 900 < event["wait_ms"] == meta["wait_ms"]
    assert event["started_ms"] + event["wait_ms"] + event["duration_ms"] <= meta["duration_ms"] + 0.01
    assert peer.call("get_stats")["result"]["lm_waiting"] == 0


def test_a_call_that_waits_for_a_limit_is_counted_and_its_wait_is_told(make: Any) -> None:
    peer, server = make(chat(answer="a"), {"max_in_flight": 1, "api_key": "sk-events-in-flight"})
    server.gate.clear()
    first = peer.request("execute_program", ASK, **ALL)
    assert server.arrived.acquire(timeout=PATIENCE)
    second = peer.request("execute_program", ASK, **ALL)
    while peer.call("get_stats")["result"]["lm_waiting"] == 0:
        pass
    began = time.monotonic()
    assert peer.call("ping")["success"]
    least = (time.monotonic() - began) * 1000
    peer.send({"cancel": second})
    meta, (event,), _ = views(reply := peer.receive())
    assert (reply["id"], event["error_type"]) == (second, "unfinished")
    assert least < event["wait_ms"] == meta["wait_ms"]
    server.gate.set()
    _, (event,), _ = views(reply := peer.receive())
    assert reply["id"] == first and event["wait_ms"] < event["duration_ms"]


@pytest.mark.parametrize("module", ["Direct", "Typed"])
def test_modules_of_users_ask_in_other_forms(folder: Path, start_lm: Any, module: str) -> None:
    """A plain string, in a thread; a request of DSPy's."""
    env = {**lm_env(start_lm("blue")), "PYTHONPATH": f"{ROOT}:{folder}", "DSPY_BRIDGE_ALLOW_MODULES": "host"}
    with shared_peer(env=env) as peer:
        create = {"id": "qa", "signature": "question -> answer", "program_type": f"host:{module}"}
        assert peer.call("create_program", create)["success"]
        reply = peer.call("execute_program", ASK, **ALL)
        assert reply["result"] == {"answer": "blue"}, reply
        _, _, (entry,) = views(reply)
        assert "Why is the sky blue?" in str(entry["messages"]) and "'user'" in str(entry["messages"])
        assert "blue" in str(entry["outputs"]) and entry["finish_reason"] == "stop"


@pytest.mark.parametrize("fails", [False, True], ids=["a result", "an error"])
def test_a_reply_that_they_would_make_too_long_comes_without_them(start_lm: Any, fails: bool) -> None:
    server = start_lm(Ended("no format", "stop") if fails else chat(answer="a"))
    with shared_peer(env={**lm_env(server), "DSPY_BRIDGE_MAX_FRAME_BYTES": "700"}) as peer:
        peer.call("create_program", {"id": "qa", "signature": "question -> answer"})
        many = {**ASK, "attempts": 3} if fails else {**ASK, "inputs": [{"question": str(n)} for n in range(3)]}
        reply = peer.call("execute_program", many, **ALL)
        meta, events, history = views(reply)
        assert reply["success"] is not fails and reply.get("error_type") in (None, "output_invalid"), reply
        assert events == [] and meta["lm_calls"] >= 3 and history == [{"omitted": meta["lm_calls"]}]


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
    with Peer(env={**lm_env(server, **planted), "DSPY_BRIDGE_LOG_LEVEL": log_level}) as peer:
        peer.call("create_program", {"id": "qa", "signature": "question -> answer"})
        shown = ""
        for what, error_type in (("say", None), ("refuse", "lm_error"), ("unfit", "output_invalid")):
            inputs = {"question": f"{what} marker-of-a-prompt {told}"}
            reply = peer.call("execute_program", {**ASK, "inputs": inputs}, **ALL)
            assert reply.get("error_type") == error_type, reply
            assert "marker-of-a-prompt" in str(reply["meta"]["history"])
            shown += json.dumps(reply["meta"])
        log = peer.finish()[2]
    assert "marker-of-an-answer" in shown and "[redacted]" in shown
    assert "planted" not in shown + log and "marker-of" not in log and "history" not in log
