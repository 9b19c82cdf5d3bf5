"""What an event of an LM call has where an LM reports something else than most."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_bridge.lm.metering import lm_events
from dspy_bridge.lm.metering.call_records import Record


def record(usages: list[dict[str, Any]]) -> Record:
    made = Record(None)
    made.started, made.ended, made.usages = 12.0, 12.5, usages
    return made


@pytest.mark.parametrize(
    ("usages", "tokens"),
    [
        ([], (0, 0)),
        ([{"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}], (3, 4)),
        ([{"input_tokens": 3, "output_tokens": 4}, {"prompt_tokens": 2.0, "completion_tokens": None}], (5, 4)),
        ([{"prompt_tokens": 0, "input_tokens": 3, "completion_tokens": "4"}], (3, 0)),
        ([{"prompt_tokens": float("nan"), "completion_tokens": float("inf")}], (0, 0)),
        ([{"prompt_tokens": -3, "completion_tokens": 10**30}], (0, 0)),
    ],
)
def test_tokens_are_whole_numbers(usages: list[dict[str, Any]], tokens: tuple[int, int]) -> None:
    (event,) = lm_events.events([record(usages)], 10.0, 20.0)
    assert (event["input_tokens"], event["output_tokens"]) == tokens
    assert (event["started_ms"], event["duration_ms"]) == (2000.0, 500.0)
