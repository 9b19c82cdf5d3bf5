"""A budget holds: no more requests at the LMs' servers, and the best program that was found by then."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from lm_server import Answer
from optimizing_host import JUDGE, SCORING, Desk, lm_answer, right

# Each answer's, as the server counts.
TOKENS = 18
MOST = 60
# Enough to go on with after 60 requests.
LONG: dict[str, dict[str, Any]] = {
    "bootstrap_few_shot": {"max_bootstrapped_demos": 400, "max_rounds": 20},
    "random_search": {"num_candidate_programs": 10},
    "copro": {"depth": 6},
    "mipro_v2": {"num_trials": 20},
    "simba": {"max_steps": 8},
    "gepa": {"max_metric_calls": 500, "skip_perfect_score": False},
}


def in_budget(desk: Desk, optimizer: str, most: int, **more: Any) -> dict[str, Any]:
    """The result of a run that has spent its LM calls."""
    options = {**LONG[optimizer], **more.pop("options", {})}
    # Bootstrapping asks for more as long as it has not found what it looks for.
    metric = {"judge": lambda **_: 0} if optimizer == "bootstrap_few_shot" else {"judge": right}
    reply = desk.run(optimizer, JUDGE, metric, options=options, budget={"lm_calls": most}, stream=True, **more)
    assert reply["success"], reply
    result: dict[str, Any] = reply["result"]
    assert result["stopped"] == "lm_calls" and result["lm_calls"] == most
    return result


@pytest.mark.parametrize(
    ("optimizer", "num_threads"), [*((name, 8) for name in SCORING), ("mipro_v2", 1), ("gepa", 64), ("copro", 64)]
)
def test_lm_calls(desk: Desk, optimizer: str, num_threads: int) -> None:
    result = in_budget(desk, optimizer, MOST, num_threads=num_threads)
    desk.nothing_follows(MOST)
    bests = [item["candidate"] for item in desk.items if item.get("candidate", {}).get("best")]
    if bests:
        assert (result["score"], result["state"]) == (bests[-1]["score"], bests[-1]["state"])
    else:
        assert result["score"] is None and result["state"]["demos"] == []
    desk.create("again", state=result["state"])


def test_retries_count(desk: Desk) -> None:
    """Every other request fails once. DSPy asks again by itself."""
    count = itertools.count()

    def flaky(request: dict[str, Any]) -> Answer:
        if next(count) % 2:
            return lm_answer(request)
        return 500, {"error": {"message": "broken", "type": "error", "code": None}}, {"Retry-After": "0"}

    desk.serve(flaky)
    lm = {"model": "openai/retried", **desk.server.options(num_retries=3)}
    args = desk.args("random_search", num_threads=64, options=LONG["random_search"], budget={"lm_calls": 20})
    reply = desk.reply_to(desk.peer.request("execute_program", {**args, "lm": lm}))
    assert reply["result"]["stopped"] == "lm_calls" and reply["result"]["lm_calls"] == 20
    desk.nothing_follows(20)


def test_cached_answers_are_free(desk: Desk) -> None:
    cached = {"model": "openai/cached", **desk.server.options(cache=True)}

    def run(most: int) -> dict[str, Any]:
        args = {**desk.args("random_search", budget={"lm_calls": most}), "lm": cached}
        result: dict[str, Any] = desk.reply_to(desk.peer.request("execute_program", args))["result"]
        return result

    whole = run(10_000)
    asked = len(desk.server.requests)
    assert whole["stopped"] is None and whole["lm_calls"] == asked
    again = run(1)
    assert len(desk.server.requests) == asked
    assert again == {**whole, "lm_calls": 0}


@pytest.mark.parametrize("optimizer", SCORING)
def test_tokens(desk: Desk, optimizer: str) -> None:
    """Those under way when they are spent are not waited for."""
    metric = {"judge": lambda **_: 0} if optimizer == "bootstrap_few_shot" else {"judge": right}
    more = {"options": LONG[optimizer], "num_threads": 4, "budget": {"tokens": 20 * TOKENS}}
    reply = desk.run(optimizer, JUDGE, metric, **more)
    assert reply["success"] and reply["result"]["stopped"] == "tokens"
    desk.nothing_follows(20 + 4)
    assert len(desk.server.requests) >= 20


def test_seconds(desk: Desk) -> None:
    """They end it while the LM is silent."""
    desk.serve(held_after=30)
    began = time.monotonic()
    reply = desk.run("random_search", budget={"seconds": 0.8}, num_threads=4)
    assert time.monotonic() - began >= 0.8
    assert reply["success"] and reply["result"]["stopped"] == "seconds"
    desk.nothing_follows(30 + 4)
