"""What `meta` has of the LM calls of a run: how they ended, what they cost, on failures too."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from conftest import BY_LITELLM
from lm_server import Answer, chat, script
from peer import PATIENCE

ASK = {"program_id": "qa", "inputs": {"question": "Why?"}}
PRICED = "openai/gpt-4o-mini"
# 11 tokens of prompt and 7 of answer, at 0.15 and 0.60 dollars a million.
COST = 11 * 0.15e-6 + 7 * 0.6e-6
HOST = """
import dspy

class Many(dspy.Module):
    async def aforward(self, question):
        for number in range(60):
            await dspy.settings.lm.acall(f"{question} {number}")
        return dspy.Prediction(answer="done")
"""
NOTHING = {
    "wait_ms": 0.0,
    "lm_usage": {},
    "lm_calls": 0,
    "cache_hits": 0,
    "finish_reasons": [],
    "fallbacks": 0,
    "cost_usd": 0.0,
}


def of_lms(meta: dict[str, Any]) -> dict[str, Any]:
    return {name: meta[name] for name in NOTHING}


@pytest.mark.parametrize("way", [{}, BY_LITELLM], ids=["own", "litellm"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_call_has_a_finish_reason_and_a_cost(make: Any, stream: bool, way: dict[str, Any]) -> None:
    peer, _ = make(chat(answer="Paris"), way)
    peer.request("execute_program", ASK, meta=True, stream=stream)
    while "success" not in (reply := peer.receive()):
        pass
    meta = reply["meta"]
    assert (meta["finish_reasons"], meta["fallbacks"]) == (["stop"], 0)
    assert meta["cost_usd"] == pytest.approx(COST)


@pytest.mark.parametrize("adapter", ["chat", "xml"])
def test_a_second_call_in_json_is_a_fallback(make: Any, adapter: str) -> None:
    peer, server = make(script("no format", '{"answer": "a"}'), adapter=adapter)
    meta = peer.call("execute_program", ASK, meta=True)["meta"]
    assert (meta["fallbacks"], meta["lm_calls"]) == (1, 2) and len(server.requests) == 2
    peer, _ = make(script("no format", "none here either"), adapter=adapter)
    reply = peer.call("execute_program", ASK, meta=True)
    assert (reply["error_type"], reply["meta"]["fallbacks"]) == ("output_invalid", 1)


def test_an_answer_without_the_schema_that_the_lm_could_have_is_a_fallback(make: Any) -> None:
    """The provider takes no free-form maps in a schema, so DSPy asks for any JSON object."""
    signature = "question -> answer: dict[str, int]"
    peer, server = make('{"answer": {"a": 1}}', adapter="json", signature=signature)
    meta = peer.call("execute_program", ASK, meta=True)["meta"]
    assert meta["lm_calls"] == 1 and server.requests[0]["response_format"] == {"type": "json_object"}
    assert meta["fallbacks"] == 1
    peer, server = make('{"answer": 1}', adapter="json", signature="question -> answer: int")
    meta = peer.call("execute_program", ASK, meta=True)["meta"]
    assert (meta["lm_calls"], meta["fallbacks"]) == (1, 0)
    assert server.requests[0]["response_format"]["type"] == "json_schema"
    # An LM that has no schemas to begin with.
    lm = {"model": "openai/of-my-own"}
    peer, server = make('{"answer": {"a": 1}}', lm, adapter="json", signature=signature)
    assert peer.call("execute_program", ASK, meta=True)["meta"]["fallbacks"] == 0


def test_a_cached_answer_costs_nothing(make: Any) -> None:
    peer, _ = make(chat(answer="Paris"), {"cache": True, "user": "costs"})
    for hits, cost in ((0, COST), (1, 0.0)):
        meta = peer.call("execute_program", ASK, meta=True)["meta"]
        assert (meta["cache_hits"], meta["finish_reasons"]) == (hits, ["stop"])
        assert meta["cost_usd"] == pytest.approx(cost)


def test_without_the_price_of_one_call_there_is_none(make: Any, start_lm: Any) -> None:
    unpriced = {"model": "openai/of-my-own", **start_lm(lambda _: chat(answer="a")).options()}
    peer, _ = make(lambda _: chat(answer="a"))
    assert peer.call("execute_program", {**ASK, "lm": unpriced}, meta=True)["meta"]["cost_usd"] is None
    step = chat(next_thought="t", next_tool_name="finish", next_tool_args="{}")
    extraction = {"model": "openai/of-my-own", **start_lm(lambda _: chat(answer="a")).options()}
    peer, _ = make(step, adapter={"name": "two_step", "extraction_model": extraction})
    meta = peer.call("execute_program", ASK, meta=True)["meta"]
    assert (meta["lm_calls"], meta["cost_usd"]) == (2, None)


def test_a_failed_call_has_no_reason_and_costs_nothing(make: Any) -> None:
    """The provider refused it. The answer to an earlier call of the run counts."""
    refused = 400, {"error": {"message": "no", "type": "error"}}
    peer, _ = make(refused)
    reply = peer.call("execute_program", ASK, meta=True)
    assert reply["error_type"] == "lm_error"
    assert of_lms(reply["meta"]) == {**NOTHING, "lm_calls": 1, "finish_reasons": [None]}
    peer, _ = make(script("no format", refused))
    reply = peer.call("execute_program", ASK, meta=True)
    assert reply["error_type"] == "lm_error" and reply["meta"]["finish_reasons"] == ["stop", None]
    assert reply["meta"]["lm_usage"][PRICED]["completion_tokens"] == 7
    assert reply["meta"]["cost_usd"] == pytest.approx(COST)


def test_tokens_of_a_call_that_failed_after_its_answer_count(make: Any) -> None:
    """Of two completions the second is refused: the first was billed, at a price that DSPy does not tell."""
    peer, _ = make(script(chat(answer="a"), (400, {"error": {"message": "no"}})), config={"n": 2, "temperature": 1.0})
    reply = peer.call("execute_program", ASK, meta=True)
    assert reply["error_type"] == "lm_error" and reply["meta"]["lm_calls"] == 1
    assert reply["meta"]["lm_usage"][PRICED]["completion_tokens"] == 7
    assert (reply["meta"]["finish_reasons"], reply["meta"]["cost_usd"]) == ([None], None)


@pytest.mark.parametrize("end", ["timeout", "cancelled"])
def test_a_run_that_is_stopped_tells_its_calls_up_to_then(make: Any, end: str) -> None:
    waiting = threading.Event()
    asked: list[object] = []

    def answer(_request: dict[str, Any]) -> Answer:
        asked.append(None)
        if len(asked) == 1:
            return "no format"
        waiting.wait(PATIENCE)
        return "late"

    peer, server = make(answer)
    id = peer.request("execute_program", ASK, meta=True, **({"timeout_ms": 700} if end == "timeout" else {}))
    for _ in range(2):
        assert server.arrived.acquire(timeout=PATIENCE)
    if end == "cancelled":
        peer.send({"cancel": id})
    reply = peer.receive()
    waiting.set()
    assert reply["error_type"] == end
    assert reply["meta"]["finish_reasons"] == ["stop", None] and reply["meta"]["fallbacks"] == 1
    assert reply["meta"]["lm_usage"][PRICED]["completion_tokens"] == 7
    assert reply["meta"]["cost_usd"] == pytest.approx(COST), "what is under way is not known to be billed"
