"""LMs that refuse requests, and answers that are cut off, are told from programs that are bad."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from lm_server import Answer, Ended
from optimizing_host import EVERY, SCORING, Desk, lm_answer

THREADS = 4


def run(desk: Desk, optimizer: str, key: str, timeout_ms: int, **lm: Any) -> dict[str, Any]:
    """With an account of its own: limits and pauses are an account's."""
    own = {"model": "openai/limited", **desk.server.options(api_key=key, **lm)}
    reflection = {"reflection_lm": own} if optimizer == "gepa" else {}
    args = {**desk.args(optimizer, num_threads=THREADS, **reflection), "lm": own}
    desk.forget()
    return desk.reply_to(desk.peer.request("execute_program", args, timeout_ms=timeout_ms))


def busy(_request: dict[str, Any]) -> Answer:
    return 429, {"error": {"message": "slow down", "type": "error", "code": None}}, {"Retry-After": "3600"}


@pytest.mark.parametrize(("optimizer", "retries"), [*((optimizer, 0) for optimizer in SCORING), ("random_search", 2)])
def test_a_server_that_refuses_all(desk: Desk, optimizer: str, retries: int) -> None:
    """With Retry-After: after the first answer the peer itself refuses what would wait past the deadline."""
    desk.serve(busy)
    reply = run(desk, optimizer, f"busy-{optimizer}-{retries}", 60_000, num_retries=retries)
    assert reply.get("error_type") in ("overloaded", "lm_error"), reply
    assert len(desk.server.requests) <= 10 + 4 * THREADS


@pytest.mark.parametrize("optimizer", ["bootstrap_few_shot", *SCORING])
def test_limits_of_ones_own(desk: Desk, optimizer: str) -> None:
    """The first refusal ends it: what follows would come too late, too."""
    reply = run(desk, optimizer, f"limited-{optimizer}", 30_000, requests_per_minute=1)
    assert reply.get("error_type") == "overloaded" and "requests_per_minute (1)" in reply["error"], reply
    assert len(desk.server.requests) <= 2


ROLES = [
    ("copro", "prompt_lm"),
    ("mipro_v2", "prompt_lm"),
    ("gepa", "reflection_lm"),
    *([("simba", "prompt_lm")] if EVERY else []),
]
# SIMBA asks its prompt_lm with these.
RULES = {"bsize": 4, "num_candidates": 3, "max_steps": 3, "temperature_for_sampling": 0.3}


def asking(desk: Desk, optimizer: str, role: str) -> dict[str, Any]:
    """The arguments for a run whose LM of that role is another one."""
    more = {"options": RULES, "seed": 0} if optimizer == "simba" else {}
    return {"num_threads": THREADS, **more, role: {"model": "openai/other", **desk.server.options(max_tokens=77)}}


def cutting(which: Callable[[int], bool]) -> Callable[[dict[str, Any]], Answer]:
    """Of the answers of the role's LM, those with these numbers are cut off."""
    count = itertools.count()

    def answer(request: dict[str, Any]) -> Answer:
        given = lm_answer(request)
        if request["model"] != "other" or not which(next(count)):
            return given
        return Ended(str(given)[:9])

    return answer


@pytest.mark.parametrize(("optimizer", "role"), ROLES)
@pytest.mark.parametrize("number", [0, 1])
def test_one_answer_that_is_cut_off(desk: Desk, optimizer: str, role: str, number: int) -> None:
    """It fails its candidate, not the run, nor the other answers to the same call."""
    desk.serve(cutting(lambda n: n == number))
    reply = desk.run(optimizer, **asking(desk, optimizer, role))
    assert reply["success"] and reply["result"]["score"] > reply["result"]["baseline"], reply


@pytest.mark.parametrize(("optimizer", "role"), ROLES)
def test_answers_that_are_all_cut_off(desk: Desk, optimizer: str, role: str) -> None:
    """The LM's role and its limit are named."""
    desk.serve(cutting(lambda _: True))
    reply = desk.run(optimizer, **asking(desk, optimizer, role))
    text = f"optimize.{role}: the LM's answer was cut off at max_tokens (77)"
    assert reply.get("error_type") == "output_invalid" and reply["error"].startswith(text), reply


def test_a_budget_that_ends_before_any_answer(desk: Desk) -> None:
    """Fewer than ten failures: the first candidate has not been scored, and no LM has answered."""
    desk.serve(lambda _: (500, {"error": {"message": "broken", "type": "error", "code": None}}))
    args = desk.args("random_search", num_threads=1, budget={"lm_calls": 3})
    reply = desk.reply_to(desk.peer.request("execute_program", args))
    assert reply.get("error_type") == "lm_error" and "LMServerError" in reply["error"], reply
