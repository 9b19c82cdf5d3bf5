"""The LM calls of one run without their contents, as `meta["lm_events"]` has them. Imports no DSPy."""

from __future__ import annotations

from typing import Any, Protocol

# A list of 10,000 inputs has as many calls; an event takes some 200 bytes. `lm_calls` counts all.
MOST = 1000
# Names come from clients and servers.
_LONGEST_NAME = 200
# By OpenAI's names, or by those that an LM of the user's may give.
_INPUT = ("prompt_tokens", "input_tokens")
_OUTPUT = ("completion_tokens", "output_tokens")
# No run uses more: neither infinity nor NaN is a count.
_MOST_TOKENS = 10**15
# The error of a call that a deadline or a cancel has ended.
_UNFINISHED = "unfinished"


class Call(Protocol):
    """What an event is made of: `call_records.Record` has it. Times are of `time.monotonic`."""

    model: str
    started: float
    ended: float | None
    error_type: str | None
    finish_reason: str | None
    cached: bool | None
    usages: list[dict[str, Any]]


def events(calls: list[Any], began: float, now: float) -> list[dict[str, Any]]:
    """Events of the first `MOST` calls, in the order of their start. `began`: when the request was received."""
    return [_event(call, began, now) for call in calls[:MOST]]


def _event(call: Call, began: float, now: float) -> dict[str, Any]:
    ended = call.ended
    error_type = _UNFINISHED if ended is None else call.error_type
    return {
        "model": call.model[:_LONGEST_NAME],
        "started_ms": _ms(call.started - began),
        "duration_ms": _ms((now if ended is None else ended) - call.started),
        "input_tokens": _tokens(call.usages, _INPUT),
        "output_tokens": _tokens(call.usages, _OUTPUT),
        "cached": call.cached is True,
        "finish_reason": call.finish_reason and call.finish_reason[:_LONGEST_NAME],
        "error_type": error_type and error_type[:_LONGEST_NAME],
    }


def _tokens(usages: list[dict[str, Any]], names: tuple[str, ...]) -> int:
    return sum(next((_count(usage[name]) for name in names if usage.get(name)), 0) for usage in usages)


def _count(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and 0 < value < _MOST_TOKENS else 0


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
