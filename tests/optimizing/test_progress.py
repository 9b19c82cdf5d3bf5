"""What a client sees of an evaluation's progress."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dspy_bridge.optimizing import candidates
from dspy_bridge.optimizing.run import Run


def test_done_begins_again_with_each_evaluation_and_ends_at_its_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two evaluations of three and two examples: 0 to 3 of 3, then 0 to 2 of 2."""
    monkeypatch.setattr(candidates, "_PROGRESS_EVERY", 0)
    sent: list[dict[str, Any]] = []
    run = cast(Run, SimpleNamespace(lm_calls=0))
    seen = candidates.Candidates("copro", None, {}, lambda _: {}, run, sent.append)
    for total in (3, 2):
        seen.begin_evaluation(total)
        for _ in range(total):
            seen.scored(None, object(), 1.0)
        seen.end_evaluation(object(), [1.0] * total, False)
    progress = [(item["progress"]["done"], item["progress"]["total"]) for item in sent]
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3), (0, 2), (1, 2), (2, 2)]
