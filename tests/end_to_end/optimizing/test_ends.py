"""An optimization that is ended from outside: one reply at once, then no request, no tool call and no thread."""

from __future__ import annotations

from typing import Any

import pytest
from optimizing_host import JUDGE, SCORING, Desk, first_of
from peer import PATIENCE

THREADS = 4


def answered(optimizer: str) -> int:
    """How many requests or tool calls are answered before the end comes."""
    return 3 if optimizer == "bootstrap_few_shot" else 20


@pytest.mark.parametrize("optimizer", SCORING)
def test_cancelled_while_the_lm_is_asked(desk: Desk, optimizer: str) -> None:
    """Requests under way are closed."""
    number = answered(optimizer)
    desk.serve(held_after=number)
    id = desk.start(optimizer, num_threads=THREADS)
    desk.lm_holds(number + 1)
    desk.peer.send({"cancel": id})
    assert desk.reply_to(id)["error_type"] == "cancelled"
    assert desk.server.closed_by_client.acquire(timeout=PATIENCE)
    desk.nothing_follows(number + THREADS)


@pytest.mark.parametrize("optimizer", SCORING)
def test_cancelled_while_the_metric_is_asked(desk: Desk, optimizer: str) -> None:
    """A score that comes afterwards changes nothing."""
    id = desk.start(optimizer, JUDGE, num_threads=THREADS)
    for _ in range(answered(optimizer)):
        answer(desk, call := tool_call(desk, id))
    call = tool_call(desk, id)
    asked = len(desk.server.requests)
    desk.peer.send({"cancel": id})
    reply = desk.reply_to(id, until=lambda frame: "tool_call" not in frame)
    assert reply["error_type"] == "cancelled"
    answer(desk, call)
    desk.nothing_follows(asked + THREADS)


@pytest.mark.parametrize("optimizer", first_of("random_search", "gepa"))
def test_at_its_deadline(desk: Desk, optimizer: str) -> None:
    """It comes while the LM is silent, or, on a slow machine, before."""
    desk.serve(held_after=20)
    assert desk.run(optimizer, num_threads=THREADS, timeout_ms=700)["error_type"] == "timeout"
    desk.nothing_follows(20 + THREADS)


def tool_call(desk: Desk, id: int) -> dict[str, Any]:
    frame = desk.reply_to(id, until=lambda frame: "tool_call" in frame)
    return dict(frame["tool_call"])


def answer(desk: Desk, call: dict[str, Any]) -> None:
    desk.peer.send({"tool_result": {"call_id": call["call_id"], "success": True, "result": 0}})
