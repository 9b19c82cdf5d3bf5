"""What ends an optimization with an error, soon: a metric that fails, an LM that refuses, is gone or is cut off."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from lm_server import Answer, Ended
from optimizing_host import EVERY, JUDGE, SCORING, Desk, fails, first_of, lm_answer
from tool_host import ToolError

THREADS = 4


def unknown(**_: Any) -> Any:
    """As an Elixir client answers for a tool that it does not have."""
    raise ToolError("there is no tool judge")


METRICS: list[tuple[Callable[..., Any], str]] = [
    (fails, "judge: the metric broke"),
    (unknown, "judge: there is no tool judge"),
    (lambda **_: "good", "judge: expected a number, a boolean or"),
]


@pytest.mark.parametrize(
    ("optimizer", "metric", "text"),
    [
        *((optimizer, *METRICS[0]) for optimizer in SCORING),
        *((optimizer, *METRICS[2]) for optimizer in SCORING),
        *(("random_search", *metric) for metric in METRICS),
    ],
)
def test_a_metric_that_fails(desk: Desk, optimizer: str, metric: Any, text: str) -> None:
    """Also as it is asked for feedback, or the first time after many good scores."""
    reply = desk.run(optimizer, JUDGE, {"judge": metric}, num_threads=THREADS)
    assert reply["error_type"] == "tool_error" and reply["error"].startswith(text), reply
    assert len(desk.asked) <= THREADS
    desk.nothing_follows()


# SIMBA asks its prompt_lm.
RULES = {"bsize": 4, "num_candidates": 3, "max_steps": 3, "temperature_for_sampling": 0.3}


def refused(_request: dict[str, Any]) -> Answer:
    return 401, {"error": {"message": "no such key", "type": "error", "code": None}}


@pytest.mark.parametrize("optimizer", SCORING)
def test_a_key_that_the_lm_refuses(desk: Desk, optimizer: str) -> None:
    desk.serve(refused)
    reply = desk.run(optimizer, num_threads=THREADS)
    assert reply["error_type"] == "lm_error" and "LMAuthError" in reply["error"] and reply["retryable"] is False
    desk.nothing_follows(THREADS)


@pytest.mark.parametrize(
    ("optimizer", "role"),
    [
        ("copro", "prompt_lm"),
        ("mipro_v2", "prompt_lm"),
        ("random_search", "teacher_lm"),
        ("bootstrap_few_shot", "teacher_lm"),
        ("simba", "prompt_lm"),
        ("gepa", "reflection_lm"),
    ],
)
def test_a_key_that_only_another_lm_refuses(desk: Desk, optimizer: str, role: str) -> None:
    """DSPy hides the failures of those in particular."""
    desk.serve(lambda request: refused(request) if request["model"] == "other" else lm_answer(request))
    other = {"model": "openai/other", **desk.server.options()}
    rules_only = {"options": RULES, "seed": 0} if optimizer == "simba" else {}
    reply = desk.run(optimizer, num_threads=THREADS, **rules_only, **{role: other})
    assert reply["error_type"] == "lm_error" and "LMAuthError" in reply["error"], reply
    desk.nothing_follows()
    assert sum(request["model"] == "other" for request in desk.server.requests) <= THREADS


def down(_request: dict[str, Any]) -> Answer:
    return 500, {"error": {"message": "broken", "type": "error", "code": None}}


@pytest.mark.parametrize("optimizer", first_of("simba", "mipro_v2", "gepa"))
@pytest.mark.parametrize("examples", [3, 12])
def test_an_lm_that_is_down(desk: Desk, optimizer: str, examples: int) -> None:
    """An error, not a score of 0, also when there are few examples to fail with."""
    desk.serve(down)
    args, options = desk.args(optimizer), {"bsize": examples} if optimizer == "simba" else {}
    some = {"inputs": args["inputs"][:examples], "wanted": args["expected"][:examples]}
    reply = desk.run(optimizer, num_threads=THREADS, options=options, **some)
    assert reply.get("error_type") == "lm_error" and "LMServerError" in reply["error"], reply
    desk.nothing_follows(10 + THREADS)


def test_failures_that_pass_end_nothing(desk: Desk) -> None:
    """Nine in a row, then an answer: they count with the score 0."""
    asked = iter(range(10**6))
    desk.serve(lambda request: lm_answer(request) if next(asked) % 10 == 9 else down(request))
    reply = desk.run("random_search", num_threads=1)
    assert reply["success"] and reply["result"]["score"] < 0.2
    assert len(desk.server.requests) > 30


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
def test_one_answer_that_is_cut_off(desk: Desk, optimizer: str, role: str) -> None:
    """It fails its candidate, not the run, nor the other answers to the same call."""
    desk.serve(cutting(lambda n: n == 1))
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
    desk.serve(down)
    args = desk.args("random_search", num_threads=1, budget={"lm_calls": 3})
    reply = desk.reply_to(desk.peer.request("execute_program", args))
    assert reply.get("error_type") == "lm_error" and "LMServerError" in reply["error"], reply
