"""The LM calls of one run for the `meta` of its reply: counts, tokens, cost, history, and events without contents."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import orjson
from dspy.utils.callback import BaseCallback

from dspy_bridge.dispatch import replies
from dspy_bridge.lm import lm_call, prompts
from dspy_bridge.lm.lm_call import LMCall
from dspy_bridge.lm.metering.history import History

_NUMBERS = (int, float)
# A list of 10,000 inputs has as many calls; an event takes some 200 bytes. `lm_calls` counts all.
MOST = 1000
# Names come from clients and servers.
_LONGEST_NAME = 200
# By OpenAI's names, or by those that an LM of the user's may give.
_INPUT = ("prompt_tokens", "input_tokens")
_OUTPUT = ("completion_tokens", "output_tokens")
_CACHED = ("prompt_tokens_details.cached_tokens", "input_tokens_details.cached_tokens")
_REASONING = ("completion_tokens_details.reasoning_tokens", "output_tokens_details.reasoning_tokens")
# No run uses more: neither infinity nor NaN is a count.
_MOST_TOKENS = 10**15
# The error of a call that a deadline or a cancel has ended.
_UNFINISHED = "unfinished"


class Meter(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    def __init__(self, history_bytes: int | None = None, events_since: float | None = None) -> None:
        """`history_bytes`: the most that `history` may take, if the reply is to have one.

        `events_since`: when the request was received, if the reply is to have `lm_events`.
        """
        self._calls: list[LMCall] = []
        # By DSPy's ids of calls under way: the call, and the one around it.
        self._open: dict[str, tuple[LMCall, LMCall | None]] = {}
        self._fallbacks = 0
        self._history = None if history_bytes is None else History(history_bytes)
        self._events_since = events_since

    def summary(self) -> dict[str, Any]:
        """What `meta` has of LMs, up to now; a cached answer is a call too.

        `{"wait_ms", "lm_usage": {model: tokens}, "lm_calls", "cache_hits", "finish_reasons": [one a call],
        "fallbacks", "cost_usd"}`, and `history` and `lm_events` if they were asked for. The cost is None if that of a
        call is not known.
        """
        calls, now = list(self._calls), time.monotonic()
        unpriced = any(call.unpriced for call in calls)
        usages: dict[str, list[dict[str, Any]]] = {}
        for call in calls:
            if call.usage:
                usages.setdefault(call.model, []).append(call.usage)
        shown = {
            "wait_ms": round(1000 * sum((call.waited(call.ended or now) for call in calls), 0.0), 3),
            "lm_usage": {model: _sum(of_model) for model, of_model in usages.items()},
            "lm_calls": len(calls),
            "cache_hits": sum(call.cached for call in calls),
            "finish_reasons": [call.finish_reason for call in calls],
            "fallbacks": self._fallbacks,
            "cost_usd": None if unpriced else round(sum(call.cost or 0.0 for call in calls), 12),
        }
        if self._history is not None:
            for call in calls:
                self._show(call, "not finished")
            shown["history"] = orjson.Fragment(self._history.json())
        if self._events_since is not None:
            shown["lm_events"] = [event(call, self._events_since, now) for call in calls[:MOST]]
        return shown

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Called by DSPy in the context of the LM call that follows."""
        outer = call = lm_call.current.get()
        if call is None or call.metered:
            call = LMCall(None, lm_call.RunContext(None))  # of an LM that your application made
        self._open[call_id] = call, outer
        call.metered = True
        call.model = str(getattr(instance, "model", ""))
        if self._history is not None:
            call.entry = self._history.begin(), prompts.of_call(inputs)
        self._calls.append(call)
        lm_call.current.set(call)

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        call, outer = self._open.pop(call_id)
        lm_call.current.set(outer)
        call.ended = time.monotonic()
        call.error_type = None if exception is None else type(exception).__name__
        if call.outputs is None and call.entry is not None:
            call.outputs = outputs
        self._show(call, None if exception is None else replies.redacted(f"{type(exception).__name__}: {exception}"))

    def fell_back(self) -> None:
        """An adapter of DSPy's goes on to a simpler format."""
        self._fallbacks += 1

    def _show(self, call: LMCall, error: str | None) -> None:
        """Write the call into the history, where that is not done yet."""
        if self._history is None or call.entry is None:
            return
        entry, messages = call.entry
        call.entry = None
        about = {
            "model": call.model,
            "outputs": call.outputs,
            "finish_reason": call.finish_reason,
            "usage": call.usage,
            "duration_ms": round(((call.ended or time.monotonic()) - call.started) * 1000, 3),
            "cached": call.cached,
            "replayed": call.replayed is not None,
            "error": error,
        }
        call.outputs = None
        self._history.end(entry, messages, about)


def _sum(usages: Iterable[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for usage in usages:
        for name, count in usage.items():
            before = total.get(name)
            if isinstance(count, dict):
                total[name] = _sum((before, count) if isinstance(before, dict) else (count,))
            elif before is None:
                total[name] = count
            elif type(before) in _NUMBERS and type(count) in _NUMBERS:
                total[name] = before + count
    return total


def event(call: LMCall, began: float, now: float) -> dict[str, Any]:
    """The call without contents. `began`: when the request was received."""
    ended = now if call.ended is None else call.ended
    error_type = _UNFINISHED if call.ended is None else call.error_type
    waited, first_chunk = call.waited(ended), call.first_chunk
    return {
        "model": call.model[:_LONGEST_NAME],
        "started_ms": _ms(call.started - began),
        "wait_ms": _ms(waited),
        "duration_ms": _ms(ended - call.started - waited),
        "first_chunk_ms": None if first_chunk is None else _ms(first_chunk - call.started - waited),
        "input_tokens": _count(call.usage, 0, _INPUT),
        "output_tokens": _count(call.usage, 0, _OUTPUT),
        "cached_tokens": _count(call.usage, None, _CACHED),
        "reasoning_tokens": _count(call.usage, None, _REASONING),
        "cost_usd": None if call.cost is None else round(call.cost, 12),
        "cached": call.cached,
        "replayed": call.replayed is not None,
        "finish_reason": call.finish_reason and call.finish_reason[:_LONGEST_NAME],
        "error_type": error_type and error_type[:_LONGEST_NAME],
    }


def _count(usage: dict[str, Any], missing: int | None, paths: tuple[str, ...]) -> int | None:
    """The first count that the provider gives."""
    for path in paths:
        value: Any = usage
        for name in path.split("."):
            value = (value or {}).get(name)
        if type(value) in _NUMBERS:
            return int(value) if 0 < value < _MOST_TOKENS else 0
    return missing


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
