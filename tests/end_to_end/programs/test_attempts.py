"""`attempts`: an LM whose answer does not fit is asked again, and told what did not fit."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from conftest import lm_env
from lm_server import LMServer, chat, script
from peer import Peer
from shared_peers import shared_peer

STARS = "review -> stars: int"
WRONG = {"chat": chat(stars="seven"), "json": '{"stars": "seven"}'}
RIGHT = {"chat": chat(stars=2), "json": '{"stars": 2}'}


def create(peer: Peer, id: str = "rate", signature: Any = STARS, **more: Any) -> None:
    assert peer.call("create_program", {"id": id, "signature": signature, **more})["success"]


def run(peer: Peer, inputs: Any = None, **args: Any) -> dict[str, Any]:
    envelope = {name: args.pop(name) for name in ("meta", "stream", "timeout_ms") if name in args}
    given = {"program_id": "rate", "inputs": {"review": "Fine."} if inputs is None else inputs, **args}
    return peer.call("execute_program", given, **envelope)


def messages(server: LMServer, number: int) -> list[dict[str, Any]]:
    return list(server.requests[number]["messages"])


@pytest.fixture
def ask(start_lm: Any) -> Any:
    """Starts a loopback LM with these answers, and gives a peer that asks it."""
    opened: list[Any] = []

    def start(*answers: Any, **options: Any) -> tuple[Peer, LMServer]:
        server = start_lm(answers[0] if callable(answers[0]) else script(*answers))
        context = shared_peer(env=lm_env(server, **options))
        opened.append(context)
        return context.__enter__(), server

    yield start
    for context in opened:
        context.__exit__(None, None, None)


def test_in_chat_each_format_has_its_own_earlier_answer(ask: Any) -> None:
    """DSPy asks a second time in JSON; then the next attempt begins in chat."""
    peer, server = ask(WRONG["chat"], WRONG["json"], WRONG["chat"], RIGHT["json"])
    create(peer)
    assert run(peer, attempts=2)["result"] == {"stars": 2}
    assert len(server.requests) == 4
    for attempt, kind in ((2, "chat"), (3, "json")):
        before, after = messages(server, attempt - 2), messages(server, attempt)
        assert after[:-2] == before
        assert after[-2] == {"role": "assistant", "content": WRONG[kind]}
        assert "Input should be a valid integer" in after[-1]["content"]


def test_it_is_asked_so_many_times_and_no_more(ask: Any) -> None:
    """Each time it is told of the last answer alone, and which attempt it is: no cache answers two of them."""
    peer, server = ask(*(f'{{"stars": "{word}"}}' for word in ("four", "five", "six")), RIGHT["json"], cache=True)
    create(peer, adapter="json")
    reply = run(peer, attempts=3, meta=True)
    assert reply["error_type"] == "output_invalid"
    assert reply["meta"]["lm_calls"] == 3 and reply["meta"]["cache_hits"] == 0
    assert reply["meta"]["lm_usage"]["openai/stub-model"]["completion_tokens"] == 21
    assert [len(request["messages"]) for request in server.requests] == [2, 4, 4]
    assert "five" in messages(server, 2)[-2]["content"] and "attempt 2 of 3" in messages(server, 2)[-1]["content"]
    # The first answer is in the cache.
    assert run(peer, attempts=1, meta=True)["meta"]["cache_hits"] == 1


def test_a_value_that_was_read_and_breaks_a_constraint(ask: Any) -> None:
    """DSPy does not check these: the answer fits DSPy, and then not the signature."""
    outputs = [{"name": "stars", "type": {"type": "integer", "maximum": 3}}]
    peer, server = ask('{"stars": 7}', RIGHT["json"])
    create(peer, signature={"inputs": [{"name": "review"}], "outputs": outputs}, adapter="json")
    assert run(peer, attempts=2)["result"] == {"stars": 2}
    last = messages(server, 1)
    assert last[-2] == {"role": "assistant", "content": '{"stars": 7}'}
    assert last[-1]["content"].startswith(
        "This answer did not fit: stars: the value is greater than the maximum of 3 ("
    )


def test_the_predictor_that_failed_is_told_and_nothing_else_runs_again(ask: Any) -> None:
    """No other step of a ReAct, and none of its tools."""
    step = json.dumps({"next_thought": "t", "next_tool_name": "look", "next_tool_args": {}})
    finish = json.dumps({"next_thought": "t", "next_tool_name": "finish", "next_tool_args": {}})
    wrong = json.dumps({"reasoning": "r", "stars": "seven"})
    peer, server = ask(step, finish, wrong, json.dumps({"reasoning": "r", "stars": 2}))
    create(peer, program_type="react", tools=[{"name": "look"}], adapter="json")
    given = {"program_id": "rate", "inputs": {"review": "Fine."}, "attempts": 2}
    id = peer.request("execute_program", given)
    call = peer.receive()["tool_call"]
    peer.send({"tool_result": {"call_id": call["call_id"], "success": True, "result": "seen"}})
    reply = peer.receive()
    assert reply["id"] == id and reply["result"]["stars"] == 2
    assert [len(request["messages"]) for request in server.requests] == [2, 2, 2, 4]


@pytest.mark.parametrize("program_type", ["chain_of_thought", "best_of_n", "refine"])
def test_other_program_types(ask: Any, program_type: str) -> None:
    options = {"reward": {"field": "stars", "equals": 2}, "n": 2, "fail_count": 1}
    best = program_type != "chain_of_thought"
    wrong, right = (json.dumps({"reasoning": "r", "stars": stars}) for stars in ("seven", 2))
    peer, server = ask(wrong, right)
    create(peer, program_type=program_type, adapter="json", **({"options": options} if best else {}))
    assert run(peer, attempts=2)["result"]["stars"] == 2
    last = messages(server, -1)
    assert last[-2] == {"role": "assistant", "content": wrong} and "did not fit: " in last[-1]["content"]


def test_a_stream_says_so_and_begins_anew(ask: Any) -> None:
    """Chunks of two attempts are never one field's."""
    peer, server = ask(chat(why="Because of this", stars="seven"), chat(why="Because", stars=2))
    create(peer, signature="review -> why, stars: int")
    given = {"program_id": "rate", "inputs": {"review": "Fine."}, "attempts": 2}
    id = peer.request("execute_program", given, stream=True)
    attempts: list[dict[str, str]] = [{}]
    while "stream" in (frame := peer.receive()):
        item = frame["stream"]
        assert frame["id"] == id
        if "status" in item:
            assert item["status"].startswith("asking again: the LM's answer did not fit the signature: ")
            attempts.append({})
        elif item.get("reset"):
            assert item == {"field": "why", "reset": True}
        else:
            attempts[-1][item["field"]] = attempts[-1].get(item["field"], "") + item["chunk"]
    assert attempts == [{"why": "Because of this"}, {"why": "Because"}]
    assert frame["result"] == {"why": "Because", "stars": 2}
    assert server.requests[1]["stream"]


def test_a_batch_asks_again_for_each_of_its_items(ask: Any) -> None:
    lock, seen = threading.Lock(), set()

    def answer(request: dict[str, Any]) -> str:
        which = next(name for name in ("one", "two", "three") if name in request["messages"][1]["content"])
        with lock:
            again = which in seen
            seen.add(which)
        return RIGHT["json"] if again or which == "two" else WRONG["json"]

    peer, server = ask(answer)
    create(peer, adapter="json")
    reply = run(peer, [{"review": name} for name in ("one", "two", "three")], attempts=2, meta=True)
    assert [item["result"] for item in reply["result"]["results"]] == [{"stars": 2}] * 3
    assert reply["meta"]["lm_calls"] == len(server.requests) == 5


@pytest.mark.parametrize("attempts", [0, 11, 1.0, True, "2"])
def test_a_number_of_attempts_that_is_none_is_refused(echo_peer: Peer, attempts: Any) -> None:
    create(echo_peer)
    reply = run(echo_peer, attempts=attempts)
    assert (reply["error_type"], reply["error"]) == ("invalid_args", "attempts: expected a whole number from 1 to 10")
