"""Calls with large inputs work like others, on other threads: streams, tools, deadlines, lists, connections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import lm_env
from lm_server import chat
from peer import PATIENCE, Peer
from shared_peers import shared_peer

QA = {"id": "qa", "signature": "question -> answer"}
LARGE = "x" * (1 << 21)
ASK = {"program_id": "qa", "inputs": {"question": LARGE}}
ANSWER = " ".join(f"word{n}" for n in range(50))


@pytest.fixture
def large(start_lm: Any) -> Iterator[tuple[Peer, Any]]:
    """A peer with a program, and its LM."""
    server = start_lm(chat(answer=ANSWER))
    with shared_peer(env=lm_env(server)) as peer:
        assert peer.call("create_program", QA)["success"]
        yield peer, server


def test_the_lm_gets_all_of_it_and_its_answer_is_streamed_in_order(large: Any) -> None:
    peer, server = large
    id = peer.request("execute_program", ASK, stream=True, meta=True)
    streamed = ""
    while "stream" in (frame := peer.receive()):
        streamed += frame["stream"]["chunk"]
    assert frame["id"] == id and streamed == ANSWER == frame["result"]["answer"]
    assert frame["meta"]["lm_calls"] == 1
    assert peer.call("execute_program", ASK)["result"] == {"answer": ANSWER}
    assert all(LARGE in json.dumps(request["messages"]) for request in server.requests)


def test_a_cancel_closes_the_lms_request(large: Any) -> None:
    peer, server = large
    server.gate.clear()
    id = peer.request("execute_program", ASK)
    assert server.arrived.acquire(timeout=PATIENCE)
    peer.send({"cancel": id})
    assert peer.receive()["error_type"] == "cancelled"
    assert server.closed_by_client.acquire(timeout=PATIENCE)


def test_large_and_small_inputs_of_one_list(large: Any) -> None:
    peer, server = large
    inputs = [{"question": "a"}, {"question": LARGE}, {"other": LARGE}, {"question": "b"}]
    results = peer.call("execute_program", {"program_id": "qa", "inputs": inputs})["result"]["results"]
    assert [result["success"] for result in results] == [True, True, False, True]
    assert results[2]["error_type"] == "invalid_args" and len(server.requests) == 3
