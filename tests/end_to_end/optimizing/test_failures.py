"""What ends an optimization with an error, soon: a metric that fails, an LM that refuses or is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lm_server import Answer
from optimizing_host import JUDGE, SCORING, Desk, fails, first_of, lm_answer
from tool_host import ToolError

THREADS = 4


def unknown(**_: Any) -> Any:
    """As an Elixir client answers for a tool that it does not have."""
    raise ToolError("there is no tool judge")


METRICS: list[tuple[Callable[..., Any], str]] = [
    (fails, "judge: the metric broke"),
    (unknown, "judge: there is no tool judge"),
    (lambda **_: "good", "judge: expected a number, a boolean or"),
    (lambda **_: None, "judge: expected a number"),
    (lambda **_: 10**400, "judge: expected a number"),
    (lambda **_: float("nan"), "judge: "),
    (lambda **_: float("inf"), "judge: "),
    (lambda **_: [1], "judge: expected a number"),
    (lambda **_: {"score": {"score": 1}}, "judge: expected a number"),
    (lambda **_: {"score": 1, "feedback": {"text": "good"}}, "judge: expected a number"),
    (lambda **_: {"feedback": "good"}, "judge: expected a number"),
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
    more = few(desk, optimizer, examples)
    reply = desk.run(optimizer, num_threads=THREADS, **more)
    assert reply.get("error_type") == "lm_error" and "LMServerError" in reply["error"], reply
    desk.nothing_follows(10 + THREADS)


def few(desk: Desk, optimizer: str, examples: int) -> dict[str, Any]:
    args = desk.args(optimizer)
    options = {"bsize": examples} if optimizer == "simba" else {}
    return {"inputs": args["inputs"][:examples], "wanted": args["expected"][:examples], "options": options}


def test_failures_that_pass_end_nothing(desk: Desk) -> None:
    """Nine in a row, then an answer: they count with the score 0."""
    asked = iter(range(10**6))
    desk.serve(lambda request: lm_answer(request) if next(asked) % 10 == 9 else down(request))
    reply = desk.run("random_search", num_threads=1)
    assert reply["success"] and reply["result"]["score"] < 0.2
    assert len(desk.server.requests) > 30
