"""What an event of an LM call has where an LM reports something else than most."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_bridge.lm.lm_call import LMCall, RunContext
from dspy_bridge.lm.metering import lm_events


def record(usages: list[dict[str, Any]]) -> LMCall:
    made = LMCall(None, RunContext(None))
    made.started, made.ended, made.usages = 12.0, 12.5, usages
    return made


@pytest.mark.parametrize(
    ("usages", "tokens"),
    [
        ([], (0, 0)),
        ([{"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}], (3, 4)),
        ([{"input_tokens": 3, "output_tokens": 4}, {"prompt_tokens": 2.0, "completion_tokens": None}], (5, 4)),
        ([{"prompt_tokens": float("nan"), "completion_tokens": -3}], (0, 0)),
    ],
)
def test_tokens_are_whole_numbers(usages: list[dict[str, Any]], tokens: tuple[int, int]) -> None:
    (event,) = lm_events.events([record(usages)], 10.0, 20.0)
    assert (event["input_tokens"], event["output_tokens"]) == tokens
    assert (event["started_ms"], event["wait_ms"], event["duration_ms"]) == (2000.0, 0.0, 500.0)


class Details:
    """As LiteLLM has them."""

    cached_tokens = 5
    reasoning_tokens = None


@pytest.mark.parametrize(
    ("usages", "tokens"),
    [
        ([], (None, None)),
        ([{"prompt_tokens": 3, "prompt_tokens_details": None}], (None, None)),
        ([{"prompt_tokens_details": {"cached_tokens": 0}}], (0, None)),
        (
            [{"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 3}}] * 2,
            (4, 6),
        ),
        ([{"prompt_tokens_details": Details(), "completion_tokens_details": Details()}], (5, None)),
        ([{"input_tokens_details": {"cached_tokens": 1}, "output_tokens_details": {"reasoning_tokens": 2}}], (1, 2)),
    ],
)
def test_details_of_tokens_are_those_that_a_provider_gives(
    usages: list[dict[str, Any]], tokens: tuple[int | None, int | None]
) -> None:
    (event,) = lm_events.events([record(usages)], 10.0, 20.0)
    assert (event["cached_tokens"], event["reasoning_tokens"]) == tokens


def test_what_a_call_waited_is_not_its_duration() -> None:
    waited = record([])
    waited.begin_wait()
    waited._waiting_since = 12.1
    assert lm_events.events([waited], 10.0, 20.0)[0]["wait_ms"] == pytest.approx(400), "refused at its end"
    waited.first_chunk = 12.45
    (event,) = lm_events.events([waited], 10.0, 20.0)
    assert [event[name] for name in ("started_ms", "wait_ms", "duration_ms", "first_chunk_ms")] == [
        pytest.approx(ms) for ms in (2000, 400, 100, 50)
    ]
