"""What an event of an LM call has where an LM reports something else than most."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_bridge.lm.lm_call import LMCall, RunContext
from dspy_bridge.lm.metering import meter


def record(usage: dict[str, Any]) -> LMCall:
    made = LMCall(None, RunContext(None))
    made.started, made.ended, made.usage = 12.0, 12.5, usage
    return made


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({}, (0, 0)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}, (3, 4)),
        ({"input_tokens": 3, "output_tokens": 4}, (3, 4)),
        ({"prompt_tokens": 2.0, "completion_tokens": None}, (2, 0)),
        ({"prompt_tokens": float("nan"), "completion_tokens": -3}, (0, 0)),
    ],
)
def test_tokens_are_whole_numbers(usage: dict[str, Any], tokens: tuple[int, int]) -> None:
    event = meter.event(record(usage), 10.0, 20.0)
    assert (event["input_tokens"], event["output_tokens"]) == tokens
    assert (event["started_ms"], event["wait_ms"], event["duration_ms"]) == (2000.0, 0.0, 500.0)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({}, (None, None)),
        ({"prompt_tokens": 3, "prompt_tokens_details": None}, (None, None)),
        ({"prompt_tokens_details": {"cached_tokens": 0}}, (0, None)),
        ({"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 3}}, (2, 3)),
        ({"input_tokens_details": {"cached_tokens": 1}, "output_tokens_details": {"reasoning_tokens": 2}}, (1, 2)),
    ],
)
def test_details_of_tokens_are_those_that_a_provider_gives(
    usage: dict[str, Any], tokens: tuple[int | None, int | None]
) -> None:
    event = meter.event(record(usage), 10.0, 20.0)
    assert (event["cached_tokens"], event["reasoning_tokens"]) == tokens


def test_what_a_call_waited_is_not_its_duration() -> None:
    waited = record({})
    waited.begin_wait()
    waited._waiting_since = 12.1
    assert meter.event(waited, 10.0, 20.0)["wait_ms"] == pytest.approx(400), "refused at its end"
    waited.first_chunk = 12.45
    event = meter.event(waited, 10.0, 20.0)
    assert [event[name] for name in ("started_ms", "wait_ms", "duration_ms", "first_chunk_ms")] == [
        pytest.approx(ms) for ms in (2000, 400, 100, 50)
    ]
