"""`execute_program` with a list of inputs, and the meta of replies with costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from batch_desk import Desk, asks, fresh, question
from conftest import lm_env
from lm_server import Answer, LMServer, chat
from peer import PATIENCE, Peer

MODEL = "openai/stub-model"


def echo(request: dict[str, Any]) -> Answer:
    asked = question(request)
    if asked == "fail":
        return 400, {"error": {"message": "no", "type": "error", "code": None}}
    if asked == "unfit":
        return chat(wrong="x")
    return chat(answer=asked)


@pytest.fixture(scope="module")
def desks() -> Iterator[Desk]:
    desk = Desk(echo)
    with desk.peer:
        yield desk
    desk.server.stop()


@pytest.fixture
def desk(desks: Desk) -> Iterator[Desk]:
    with fresh(desks, echo) as desk:
        yield desk


def test_config_and_lm_hold_for_all(desk: Desk) -> None:
    args = {"config": {"temperature": 0.9}, "lm": {"model": "openai/other", **desk.server.options()}}
    assert desk.run({"inputs": asks("a", "b"), **args})["success"]
    assert [(r["model"], r["temperature"]) for r in desk.server.requests] == [("other", 0.9)] * 2
    results = desk.run({"inputs": asks("a", "b"), "config": {"n": "many"}})["result"]["results"]
    assert [result["error_type"] for result in results] == ["invalid_args"] * 2


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ten_thousand_items(desk: Desk) -> None:
    lm = {"model": "offline/echo"}
    desk.peer.call("create_program", {"id": "many", "signature": "question -> answer", "lm": lm})
    items = asks(*map(str, range(10_000)))
    items[77] = {"other": "x"}
    id = desk.start({"program_id": "many", "inputs": items}, meta=True)
    ping = desk.peer.request("ping")
    assert desk.peer.receive()["id"] == ping, "pings do not wait for it"
    # Several seconds of work.
    reply = desk.peer.receive(2 * PATIENCE)
    results = reply["result"]["results"]
    assert reply["id"] == id and len(results) == 10_000
    assert all(
        result == {"success": True, "result": {"answer": f"echo: {n}"}} for n, result in enumerate(results) if n != 77
    )
    assert results[77]["error_type"] == "invalid_args"
    assert reply["meta"]["lm_calls"] == 9999
    desk.becomes_idle()


def test_the_deadline_of_many_items_comes_in_time(start_lm: Callable[..., LMServer]) -> None:
    """With a thousand keys, none of which an error may show: for each item it would take 0.1 ms to look for them."""
    keys = {f"TENANT_{number}_API_KEY": f"key-of-tenant-{number}" for number in range(1000)}
    server = start_lm()
    server.gate.clear()
    with Peer(env={**lm_env(server), **keys}) as peer:
        assert peer.call("create_program", {"id": "qa", "signature": "question -> answer"})["success"]
        inputs = asks("Why?") * 30_000
        reply = peer.call("execute_program", {"program_id": "qa", "inputs": inputs}, timeout_ms=1500, meta=True)
        assert len(reply["result"]["results"]) == 30_000
        assert reply["meta"]["duration_ms"] < 2500
    server.gate.set()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"max_concurrency": 0}, "max_concurrency: expected a whole number of at least 1"),
        ({"max_concurrency": 2.0}, "max_concurrency: expected a whole number of at least 1"),
        ({"max_concurrency": True}, "max_concurrency: expected a whole number of at least 1"),
        ({"item_timeout_ms": 0}, "item_timeout_ms: expected a number of milliseconds greater than 0"),
        ({"item_timeout_ms": "5"}, "item_timeout_ms: expected a number of milliseconds greater than 0"),
        ({"item_timeout_ms": True}, "item_timeout_ms: expected a number of milliseconds greater than 0"),
    ],
)
def test_limits_of_a_batch_that_are_wrong_are_refused_by_name(desk: Desk, args: dict[str, Any], expected: str) -> None:
    reply = desk.run({"inputs": asks("a"), **args})
    assert (reply["error_type"], reply["error"]) == ("invalid_args", expected)
    assert not desk.server.requests


def test_a_cancel_closes_the_lms_requests(desk: Desk) -> None:
    desk.server.gate.clear()
    id = desk.start({"inputs": asks(*map(str, range(20)))})
    for _ in range(8):
        assert desk.server.arrived.acquire(timeout=PATIENCE)
    desk.peer.send({"cancel": id})
    reply = desk.peer.receive()
    assert (reply["id"], reply["error_type"]) == (id, "cancelled")
    for _ in range(8):
        assert desk.server.closed_by_client.acquire(timeout=PATIENCE)
    desk.becomes_idle()
    assert len(desk.server.requests) == 8


def test_the_meta_of_a_batch_is_that_of_all_items(desk: Desk) -> None:
    meta = desk.run({"inputs": [*asks("a", "b", "fail"), 5]}, meta=True)["meta"]
    assert meta["lm_calls"] == 3 and meta["cache_hits"] == 0
    assert meta["lm_usage"][MODEL]["prompt_tokens"] == 22
    assert meta["duration_ms"] > meta["queue_ms"] >= 0


def test_executes_at_once_do_not_mix_their_meta(desk: Desk) -> None:
    """Eight at once, half of them with a second LM call, some with another model."""
    desk.server.gate.clear()
    ids = {}
    for n in range(8):
        asked: dict[str, Any] = {"program_id": "qa", "inputs": {"question": "unfit" if n % 2 else "a"}}
        if n < 4:
            asked["lm"] = {"model": f"openai/own-{n}", **desk.server.options()}
        ids[desk.peer.request("execute_program", asked, meta=True)] = n
    for _ in ids:
        assert desk.server.arrived.acquire(timeout=PATIENCE)
    desk.server.gate.set()
    for id, reply in desk.peer.receive_all(8).items():
        n = ids[id]
        calls = 2 if n % 2 else 1
        assert reply["meta"]["lm_calls"] == calls
        model = f"openai/own-{n}" if n < 4 else MODEL
        assert {name: used["completion_tokens"] for name, used in reply["meta"]["lm_usage"].items()} == {
            model: 7 * calls
        }


def test_several_completions_are_one_call_with_all_their_tokens(desk: Desk) -> None:
    """Each is a separate request."""
    meta = desk.run({"inputs": {"question": "a"}, "config": {"n": 3}}, meta=True)["meta"]
    assert meta["lm_calls"] == 1 and meta["lm_usage"][MODEL]["completion_tokens"] == 7 * 3
    assert len(desk.server.requests) == 3
