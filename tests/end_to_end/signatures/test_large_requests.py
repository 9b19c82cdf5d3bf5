"""Calls with large inputs work like others, on other threads: streams, tools, deadlines, lists, connections."""

from __future__ import annotations

import json
from typing import Any

from conftest import lm_env
from lm_server import chat
from peer import PATIENCE, Peer

QA = {"id": "qa", "signature": "question -> answer"}
LARGE = "x" * (1 << 21)
ASK = {"program_id": "qa", "inputs": {"question": LARGE}}
ANSWER = " ".join(f"word{n}" for n in range(50))


def test_the_lm_gets_all_of_it_and_its_answer_is_streamed_in_order(start_lm: Any) -> None:
    server = start_lm(chat(answer=ANSWER))
    with Peer(env=lm_env(server)) as peer:
        peer.call("create_program", QA)
        id = peer.request("execute_program", ASK, stream=True, meta=True)
        streamed = ""
        while "stream" in (frame := peer.receive()):
            streamed += frame["stream"]["chunk"]
        assert frame["id"] == id and streamed == ANSWER == frame["result"]["answer"]
        assert frame["meta"]["lm_calls"] == 1
        assert peer.call("execute_program", ASK)["result"] == {"answer": ANSWER}
    assert all(LARGE in json.dumps(request["messages"]) for request in server.requests)


def test_a_cancel_closes_the_lms_request(start_lm: Any) -> None:
    server = start_lm()
    server.gate.clear()
    with Peer(env=lm_env(server)) as peer:
        peer.call("create_program", QA)
        id = peer.request("execute_program", ASK)
        assert server.arrived.acquire(timeout=PATIENCE)
        peer.send({"cancel": id})
        assert peer.receive()["error_type"] == "cancelled"
        assert server.closed_by_client.acquire(timeout=PATIENCE)


def test_large_and_small_inputs_of_one_list(start_lm: Any) -> None:
    server = start_lm()
    with Peer(env=lm_env(server)) as peer:
        peer.call("create_program", QA)
        inputs = [{"question": "a"}, {"question": LARGE}, {"other": LARGE}, {"question": "b"}]
        results = peer.call("execute_program", {"program_id": "qa", "inputs": inputs})["result"]["results"]
    assert [result["success"] for result in results] == [True, True, False, True]
    assert results[2]["error_type"] == "invalid_args" and len(server.requests) == 3
