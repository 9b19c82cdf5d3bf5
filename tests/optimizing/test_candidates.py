"""Which candidate is announced as the best one, and which is the result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dspy_bridge.lm.budgets import Budget
from dspy_bridge.optimizing import candidates
from dspy_bridge.optimizing.candidates import Candidates

START, FIRST, SECOND = "start", "first", "second"


def made(sent: list[dict[str, Any]]) -> Candidates:
    """Programs are their names here."""
    counts: Any = SimpleNamespace(budget=Budget(), metric_calls=0)
    return Candidates("copro", 2, {"is": START}, lambda name: {"is": name}, counts, sent.append)


@pytest.mark.parametrize(
    ("scored", "best"),
    [
        ([(START, 0.5), (FIRST, 0.5)], START),
        ([(FIRST, 0.5), (START, 0.5)], START),
        ([(START, 0.0), (FIRST, 0.5), (SECOND, 0.5)], FIRST),
        ([(FIRST, 0.5), (SECOND, 0.7), (START, 0.5)], SECOND),
        ([(START, 0.7), (FIRST, 0.5)], START),
    ],
)
@pytest.mark.parametrize("chosen", [FIRST, SECOND, None])
def test_of_equal_scores_the_one_that_was_announced_is_the_result(
    scored: list[tuple[str, float]], best: str, chosen: str | None
) -> None:
    """Whatever the optimizer itself chooses. The program as it was wins; of others the first."""
    sent: list[dict[str, Any]] = []
    them = made(sent)
    for name, score in scored:
        them.end_evaluation(name, [score, score], True)
    announced = [item["candidate"]["state"] for item in sent if item.get("candidate", {}).get("best")]
    result = them.result(chosen)
    assert result["state"] == announced[-1] == {"is": best}
    assert result["score"] == dict(scored)[best] and result["candidates"] == len(scored)


def test_without_a_score_the_optimizers_own_result_counts() -> None:
    them = made([])
    assert them.result(FIRST)["state"] == {"is": FIRST}
    assert them.result(None, "seconds")["state"] == {"is": START}
    assert them.result(FIRST)["score"] is None


def test_done_begins_again_with_each_evaluation_and_ends_at_its_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two evaluations of three and two examples: 0 to 3 of 3, then 0 to 2 of 2."""
    monkeypatch.setattr(candidates, "_PROGRESS_EVERY", 0)
    sent: list[dict[str, Any]] = []
    run: Any = SimpleNamespace(budget=Budget())
    seen = Candidates("copro", None, {}, lambda _: {}, run, sent.append)
    for total in (3, 2):
        seen.begin_evaluation(total)
        for _ in range(total):
            seen.scored(None, object(), 1.0)
        seen.end_evaluation(object(), [1.0] * total, False)
    progress = [(item["progress"]["done"], item["progress"]["total"]) for item in sent]
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3), (0, 2), (1, 2), (2, 2)]
