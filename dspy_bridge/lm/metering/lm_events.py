"""The LM calls of one run without their contents, as `meta["lm_events"]` has them."""

from __future__ import annotations

from typing import Any

from dspy_bridge.lm.lm_call import LMCall

# A list of 10,000 inputs has as many calls; an event takes some 200 bytes. `lm_calls` counts all.
MOST = 1000
# Names come from clients and servers.
_LONGEST_NAME = 200
# By OpenAI's names, or by those that an LM of the user's may give.
_INPUT = ("prompt_tokens", "input_tokens")
_OUTPUT = ("completion_tokens", "output_tokens")
_CACHED = (("prompt_tokens_details", "cached_tokens"), ("input_tokens_details", "cached_tokens"))
_REASONING = (("completion_tokens_details", "reasoning_tokens"), ("output_tokens_details", "reasoning_tokens"))
# No run uses more: neither infinity nor NaN is a count.
_MOST_TOKENS = 10**15
# The error of a call that a deadline or a cancel has ended.
_UNFINISHED = "unfinished"


def events(calls: list[LMCall], began: float, now: float) -> list[dict[str, Any]]:
    """Events of the first `MOST` calls, in the order of their start. `began`: when the request was received."""
    return [_event(call, began, now) for call in calls[:MOST]]


def _event(call: LMCall, began: float, now: float) -> dict[str, Any]:
    ended = now if call.ended is None else call.ended
    error_type = _UNFINISHED if call.ended is None else call.error_type
    waited, first_chunk = call.waited(ended), call.first_chunk
    return {
        "model": call.model[:_LONGEST_NAME],
        "started_ms": _ms(call.started - began),
        "wait_ms": _ms(waited),
        "duration_ms": _ms(ended - call.started - waited),
        "first_chunk_ms": None if first_chunk is None else _ms(first_chunk - call.started - waited),
        "input_tokens": _tokens(call.usage, _INPUT),
        "output_tokens": _tokens(call.usage, _OUTPUT),
        "cached_tokens": _details(call.usage, _CACHED),
        "reasoning_tokens": _details(call.usage, _REASONING),
        "cost_usd": None if call.cost is None else round(call.cost, 12),
        "cached": call.cached,
        "finish_reason": call.finish_reason and call.finish_reason[:_LONGEST_NAME],
        "error_type": error_type and error_type[:_LONGEST_NAME],
    }


def _tokens(usage: dict[str, Any], names: tuple[str, ...]) -> int:
    return next((_count(usage[name]) for name in names if usage.get(name)), 0)


def _details(usage: dict[str, Any], names: tuple[tuple[str, str], ...]) -> int | None:
    """The count that the provider gives; None if it gives none."""
    counts = [(usage.get(details) or {}).get(name) for details, name in names]
    return next((_count(count) for count in counts if isinstance(count, (int, float))), None)


def _count(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and 0 < value < _MOST_TOKENS else 0


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
