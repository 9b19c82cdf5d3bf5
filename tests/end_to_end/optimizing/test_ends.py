"""An optimization that is ended from outside: one reply at once, then no request, no tool call and no thread."""

from __future__ import annotations

import time
from typing import Any

import psutil
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


@pytest.mark.parametrize("ends", ["by itself", "by a cancel", "by its budget"])
def test_its_connections_to_lms_are_closed(desk: Desk, ends: str) -> None:
    """At once, and not when garbage is collected, which an idle peer never does."""
    desk.execute()
    before = connections(desk)
    desk.serve(held_after=20 if ends == "by a cancel" else None)
    teacher = {"model": "openai/teacher", **desk.server.options()}
    budget = {"budget": {"lm_calls": 15}} if ends == "by its budget" else {}
    id = desk.start("random_search", num_threads=THREADS, teacher_lm=teacher, **budget)
    if ends == "by a cancel":
        desk.lm_holds(21)
        assert connections(desk) > before
        desk.peer.send({"cancel": id})
    assert desk.reply_to(id)["success"] is (ends != "by a cancel")
    end = time.monotonic() + PATIENCE
    while (now := connections(desk)) > before:
        assert time.monotonic() < end, (before, now)


def connections(desk: Desk) -> int:
    """Open ones of the peer to its LM."""
    return len(psutil.Process(desk.peer.process.pid).net_connections())
