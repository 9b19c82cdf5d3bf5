"""`offline/script`: answers that the client chooses, through all of DSPy."""

from __future__ import annotations

import json
from typing import Any

import pytest
from peer import Peer

QA = "question -> answer, certain: bool"
ADAPTERS = ["chat", "json", "xml"]


def script(answers: Any, **more: Any) -> dict[str, Any]:
    return {"model": "offline/script", "answers": answers, **more}


def create(peer: Peer, answers: Any = None, signature: Any = QA, **more: Any) -> None:
    lm = {} if answers is None else {"lm": script(answers)}
    reply = peer.call("create_program", {"id": "qa", "signature": signature, **lm, **more})
    assert reply["success"], reply


def run(peer: Peer, question: Any = "Why?", stream: bool = False, **args: Any) -> dict[str, Any]:
    inputs = question if isinstance(question, list) else {"question": question}
    return peer.call("execute_program", {"program_id": "qa", "inputs": inputs, **args}, stream=stream)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_fields_are_written_in_the_adapters_format(echo_peer: Peer, adapter: str) -> None:
    tricky = 'a "quoted" <b>&amp; [[ x ]]\nline'
    create(echo_peer, [{"answer": tricky, "certain": False}], adapter=adapter)
    assert run(echo_peer)["result"] == {"answer": tricky, "certain": False}


def test_a_list_gives_one_answer_after_the_other_and_then_none(echo_peer: Peer) -> None:
    create(echo_peer, [{"answer": text, "certain": True} for text in "ab"])
    assert [run(echo_peer)["result"]["answer"] for _ in "ab"] == ["a", "b"]
    reply = run(echo_peer)
    assert (reply["error_type"], reply["retryable"]) == ("lm_error", False)
    assert reply["error"] == "NoAnswer: [offline/script] all 2 answers are used"
    create(echo_peer, [{"answer": text, "certain": True} for text in "ab"])
    assert run(echo_peer)["result"]["answer"] == "a", "a program that is created again begins anew"


def test_a_map_chooses_by_the_question(echo_peer: Peer) -> None:
    answers = {"red": {"answer": "r", "certain": True}, "red shirt": {"answer": "s", "certain": True}}
    create(echo_peer, {**answers, "*": {"answer": "other", "certain": False}})
    questions = [{"question": text} for text in ("a red shirt?", "a red hat?", "a star: *?")]
    results = run(echo_peer, questions)["result"]["results"]
    assert [item["result"]["answer"] for item in results] == ["s", "r", "other"]
    create(echo_peer, answers)
    reply = run(echo_peer, "blue?")
    assert reply["error_type"] == "lm_error"
    assert reply["error"] == "NoAnswer: [offline/script] the last message contains none of the 2 texts of its answers"


def test_as_the_peers_lm_all_programs_share_its_list() -> None:
    options = {"answers": [{"answer": text, "certain": True} for text in "abc"]}
    settings = {"DSPY_BRIDGE_LM": "offline/script", "DSPY_BRIDGE_LM_OPTIONS": json.dumps(options)}
    with Peer(env=settings) as peer:
        create(peer)
        assert run(peer)["result"]["answer"] == "a"
        create(peer, program_type="chain_of_thought")
        assert run(peer)["result"] == {"reasoning": "", "answer": "b", "certain": True}
        call = script([{"answer": "own", "certain": True}])
        assert run(peer, lm=call)["result"]["answer"] == "own"
        assert run(peer)["result"]["answer"] == "c"
        assert peer.finish() == (0, b"", "")


@pytest.mark.agents
def test_steps_of_a_react(echo_peer: Peer) -> None:
    """A step may leave out what it does not need."""
    steps = [
        {"next_tool_name": "search", "next_tool_args": {"query": "x"}},
        {"next_thought": "found", "next_tool_name": "finish"},
        {"answer": "here", "certain": True},
    ]
    tools = [{"name": "search", "args": {"query": "str"}}]
    create(echo_peer, steps, program_type="react", tools=tools)
    id = echo_peer.request("execute_program", {"program_id": "qa", "inputs": {"question": "Where?"}})
    call = echo_peer.receive()["tool_call"]
    assert (call["name"], call["args"]) == ("search", {"query": "x"})
    echo_peer.send({"tool_result": {"call_id": call["call_id"], "success": True, "result": "y"}})
    reply = echo_peer.receive()
    assert reply["id"] == id and reply["result"]["answer"] == "here"
    assert reply["result"]["trajectory"]["observation_0"] == "y"
    assert reply["result"]["trajectory"]["thought_1"] == "found"


def test_fields_that_there_are_not_are_named(echo_peer: Peer) -> None:
    create(echo_peer, [{"anwser": "a"}], adapter="json")
    reply = run(echo_peer)
    assert reply["error_type"] == "lm_error"
    expected = "NoAnswer: [offline/script] its answer has an unknown field 'anwser'; expected answer, certain"
    assert reply["error"] == expected


@pytest.mark.parametrize(
    ("lm", "expected"),
    [
        (script(None), "lm.answers: expected a list of answers, or an object of texts and answers"),
        (script([]), "lm.answers: expected a list of answers, or an object of texts and answers"),
        (script("a"), "lm.answers: expected a list of answers, or an object of texts and answers"),
        ("offline/script", "lm.answers: expected a list of answers, or an object of texts and answers"),
        (script(["a", 5]), "lm.answers[1]: expected text, or an object of output fields"),
        (script({"a": None}), "lm.answers['a']: expected text, or an object of output fields"),
        ({"model": "offline/echo", "answers": ["a"]}, "lm.answers: only for offline/script"),
    ],
)
def test_what_is_wrong_with_the_answers_is_an_argument_error(echo_peer: Peer, lm: Any, expected: str) -> None:
    reply = echo_peer.call("create_program", {"id": "qa", "signature": QA, "lm": lm})
    assert (reply["error_type"], reply["error"]) == ("invalid_args", expected)
