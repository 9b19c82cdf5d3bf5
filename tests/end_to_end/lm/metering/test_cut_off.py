"""Answers that were cut off at `max_tokens`: no output, unless the client takes them."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import SLOW_BY_LITELLM
from lm_server import Answer, Ended, chat, completion, event, script
from peer import Peer

ASK = {"program_id": "qa", "inputs": {"question": "Why?"}}
# Each would be read without an error if nothing looked at the finish reason.
CUT = {
    "chat": "[[ ## reasoning ## ]]\nBecause.\n\n[[ ## answer ## ]]\nIt is sa",
    "json": '{"reasoning": "Because.", "answer": "It is sa',
    "xml": "<reasoning>Because.</reasoning><answer>It is sa</answer>",
}
WHOLE = {
    "chat": chat(reasoning="Because.", answer="It is safe."),
    "json": '{"reasoning": "Because.", "answer": "It is safe."}',
    "xml": "<reasoning>Because.</reasoning><answer>It is safe.</answer>",
}
WAYS = pytest.mark.parametrize("way", [pytest.param({}, id="own"), SLOW_BY_LITELLM])
TEXT = (
    "the LM's answer was cut off at max_tokens (30); give it more, or take what there is with "
    "config.allow_truncated: true"
)


def collected(peer: Peer, args: dict[str, Any], **envelope: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The items of a stream, and the reply."""
    peer.request("execute_program", args, **envelope)
    items: list[dict[str, Any]] = []
    while "success" not in (frame := peer.receive()):
        items.append(frame["stream"])
    return items, frame


@WAYS
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("program_type", ["predict", "chain_of_thought"])
@pytest.mark.parametrize("adapter", CUT)
def test_an_answer_that_was_cut_off_is_refused(
    make: Any, adapter: str, program_type: str, stream: bool, way: dict[str, Any]
) -> None:
    """The LM is asked once. Chunks have been shown by then."""
    lm = {"max_tokens": 30, **way}
    peer, server = make(Ended(CUT[adapter]), lm, adapter=adapter, program_type=program_type)
    items, reply = collected(peer, ASK, stream=stream, meta=True)
    assert (reply["error_type"], reply["error"]) == ("output_invalid", TEXT)
    assert len(server.requests) == reply["meta"]["lm_calls"] == 1
    assert reply["meta"]["finish_reasons"] == ["length"] and reply["meta"]["fallbacks"] == 0
    assert reply["meta"]["lm_usage"]["openai/stub"]["completion_tokens"] == 7
    chunks = "".join(item["chunk"] for item in items if item.get("field") == "answer")
    assert not stream or chunks.startswith("It is")


@pytest.mark.parametrize("where", ["program", "call"])
@pytest.mark.parametrize("adapter", CUT)
def test_it_is_taken_if_the_client_allows_it(make: Any, adapter: str, where: str) -> None:
    config = {"allow_truncated": True, "temperature": 0.5}
    peer, server = make(Ended(CUT[adapter]), adapter=adapter, **({"config": config} if where == "program" else {}))
    reply = peer.call("execute_program", ASK if where == "program" else {**ASK, "config": config}, meta=True)
    assert reply["result"] == {"answer": "It is sa"} and reply["meta"]["finish_reasons"] == ["length"]
    (request,) = server.requests
    assert request["temperature"] == 0.5 and "allow_truncated" not in request


def test_it_is_true_or_false(make: Any) -> None:
    peer, _ = make(WHOLE["chat"])
    for args in ({**ASK, "config": {"allow_truncated": "yes"}}, {**ASK, "config": {"allow_truncated": None}}):
        reply = peer.call("execute_program", args)
        assert (reply["error_type"], reply["error"]) == (
            "invalid_args",
            "config.allow_truncated: expected true or false",
        )
    reply = peer.call("create_program", {"id": "x", "signature": "a -> b", "config": {"allow_truncated": 1}})
    assert reply["error"] == "config.allow_truncated: expected true or false"
    reply = peer.call("execute_program", {**ASK, "config": {"allow_truncatd": True}})
    assert reply["error"].startswith("config.allow_truncatd: unknown option; did you mean allow_truncated?")


@WAYS
def test_the_text_has_the_limit_that_was_in_effect(make: Any, way: dict[str, Any]) -> None:
    """That of the call, else that of the program, else that of the LM; none if the LM's provider chose it."""
    lm = {"max_tokens": 10, **way}
    peer, _ = make(Ended(CUT["chat"]), lm, config={"max_tokens": 20})
    assert "at max_tokens (20);" in peer.call("execute_program", ASK)["error"]
    assert "at max_tokens (40);" in peer.call("execute_program", {**ASK, "config": {"max_tokens": 40}})["error"]
    peer, _ = make(Ended(CUT["chat"]), lm)
    assert "at max_tokens (10);" in peer.call("execute_program", ASK)["error"]
    peer, _ = make(Ended(CUT["chat"]), way)
    error = peer.call("execute_program", ASK)["error"]
    assert "was cut off at max_tokens, of which none was set: at the limit of the LM;" in error


@pytest.mark.parametrize("step", [0, 1], ids=["the step", "the answer"])
def test_an_agent_ends_with_a_step_that_was_cut_off(make: Any, step: int) -> None:
    """What it would do next is unknown, so it neither calls a tool nor goes on."""
    cut = "[[ ## next_thought ## ]]\nt\n\n[[ ## next_tool_name ## ]]\nfinish\n\n[[ ## next_tool_args ## ]]\n{}"
    done = chat(next_thought="t", next_tool_name="finish", next_tool_args="{}")
    answers: list[Answer] = [Ended(cut)] if step == 0 else [done, Ended(CUT["chat"])]
    peer, server = make(script(*answers), {"max_tokens": 30}, program_type="react", tools=[{"name": "look"}])
    reply = peer.call("execute_program", ASK, meta=True)
    assert (reply["error_type"], reply["error"]) == ("output_invalid", TEXT)
    assert len(server.requests) == step + 1
    assert reply["meta"]["finish_reasons"] == ["stop", "length"][1 - step :]


@WAYS
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_tool_call_that_was_cut_off_is_not_made(make: Any, stream: bool, way: dict[str, Any]) -> None:
    """Of native function calling: its arguments end in the middle."""
    called = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"query": "a'}}

    def answer(request: dict[str, Any]) -> Answer:
        assert "tools" in request
        if request.get("stream"):
            delta = {"role": "assistant", "tool_calls": [{"index": 0, **called}]}
            return Ended(iter([event(request["model"], delta, None)]))
        body = completion(request["model"], "", "length")
        body["choices"][0]["message"].update(content=None, tool_calls=[called])
        return 200, body

    lm = {"model": "openai/gpt-4o-mini", "max_tokens": 30, **way}
    tools = [{"name": "look", "args": {"query": {"type": "str"}}}]
    peer, server = make(answer, lm, tools=tools)
    _, reply = collected(peer, ASK, stream=stream, meta=True)
    assert (reply["error_type"], reply["error"]) == ("output_invalid", TEXT)
    assert reply["meta"]["finish_reasons"] == ["length"] and len(server.requests) == 1
