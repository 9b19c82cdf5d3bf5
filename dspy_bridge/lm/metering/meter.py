"""Counts the LM calls of one run, their tokens and their cost, for the `meta` of its reply."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any

from dspy.utils.callback import BaseCallback

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.metering import call_records, history, lm_events
from dspy_bridge.lm.metering.call_records import Record
from dspy_bridge.lm.metering.history import History

# Of the run in this context.
_current: ContextVar[Meter | None] = ContextVar("meter", default=None)

# The `response_format` of an LM call that any JSON object answers.
PLAIN_JSON = {"type": "json_object"}


class Meter(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    """A DSPy callback with a usage tracker for DSPy's settings, which is None where DSPy has none."""

    def __init__(self, history_bytes: int | None = None, events_since: float | None = None) -> None:
        """`history_bytes`: the most that `history` may take, if the reply is to have one.

        `events_since`: when the request was received, if the reply is to have `lm_events`.
        """
        counted = dspy_internals.USAGE_TRACKER.there and dspy_internals.USAGE_SETTING.there
        self.tracker: Any = _Tracker() if counted else None
        self._records: list[Record] = []
        # By DSPy's ids of calls under way.
        self._open: dict[str, Record] = {}
        self._fallbacks = 0
        self._history = None if history_bytes is None else History(history_bytes)
        self._events_since = events_since

    def settings(self) -> dict[str, Any]:
        """DSPy's settings by which tokens are counted, for the run in this context."""
        _current.set(self)
        return {} if self.tracker is None else {dspy_internals.USAGE_SETTING.attribute: self.tracker}

    def summary(self) -> dict[str, Any]:
        """What `meta` has of LMs, up to now; a cached answer is a call too.

        `{"wait_ms", "lm_usage": {model: tokens}, "lm_calls", "cache_hits", "finish_reasons": [one a call],
        "fallbacks", "cost_usd"}`, and `history` and `lm_events` if they were asked for. The cost is None if that of a
        call is not known.
        """
        records, now = list(self._records), time.monotonic()
        unpriced = any(record.unpriced for record in records)
        shown = {
            "wait_ms": round(1000 * sum((record.times.waited(record.ended or now) for record in records), 0.0), 3),
            "lm_usage": {} if self.tracker is None else self.tracker.get_total_tokens(),
            "lm_calls": len(records),
            "cache_hits": sum(record.cached is True for record in records),
            "finish_reasons": [record.finish_reason for record in records],
            "fallbacks": self._fallbacks,
            "cost_usd": None if unpriced else round(sum(record.cost or 0.0 for record in records), 12),
        }
        if self._history is not None:
            for record in records:
                self._show(record, "not finished")
            shown["history"] = self._history.json()
        if self._events_since is not None:
            shown["lm_events"] = lm_events.events(records, self._events_since, now)
        return shown

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Called by DSPy in the context of the LM call that follows."""
        record = self._open[call_id] = Record(call_records.current.get())
        if self._history is not None or self._events_since is not None:
            record.model = str(getattr(instance, "model", ""))
        if self._history is not None:
            record.entry = self._history.begin(), _messages(inputs)
        self._records.append(record)
        call_records.current.set(record)

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Called by DSPy in the same context."""
        record = self._open.pop(call_id)
        call_records.current.set(record.outer)
        record.outer = None
        record.ended = time.monotonic()
        record.error_type = None if exception is None else type(exception).__name__
        if record.cached is None and self.tracker is not None and exception is None:
            # DSPy tracks no usage for an answer from the cache.
            record.cached = not record.usages
        if record.outputs is None and record.entry is not None:
            record.outputs = outputs
        self._show(record, None if exception is None else history.shown_error(exception))

    def fell_back(self) -> None:
        """An adapter of DSPy's goes on to a simpler format."""
        self._fallbacks += 1

    def _show(self, record: Record, error: str | None) -> None:
        """Write the call into the history, where that is not done yet."""
        if self._history is None or record.entry is None:
            return
        entry, messages = record.entry
        record.entry = None
        about = {
            "model": record.model,
            "outputs": record.outputs,
            "finish_reason": record.finish_reason,
            "usage": _usage(record),
            "duration_ms": round(((record.ended or time.monotonic()) - record.started) * 1000, 3),
            "cached": record.cached is True,
            "error": error,
        }
        record.outputs = None
        self._history.end(entry, messages, about)


def counting() -> bool:
    """Whether the reply of the run in this context has meta."""
    return _current.get() is not None


def fell_back() -> None:
    """Count a fallback of the run in this context, if its reply has meta."""
    meter = _current.get()
    if meter is not None:
        meter.fell_back()


def _messages(inputs: dict[str, Any]) -> Any:
    """What an LM is sent, from the arguments of its call."""
    if inputs.get("messages") is not None:
        return inputs["messages"]
    # A typed request of DSPy's has messages, too.
    asked = (inputs.get("prompt"), inputs.get("request"), inputs.get("kwargs", {}).get("request"))
    first = next((given for given in (*asked, *inputs.get("items", ())) if given is not None), None)
    return [{"role": "user", "content": first}] if isinstance(first, str) else getattr(first, "messages", None)


def _usage(record: Record) -> dict[str, Any]:
    if not record.usages:
        return {}
    total = dspy_internals.USAGE_TRACKER.value()
    for usage in record.usages:
        total.add_usage("", usage)
    found: dict[str, Any] = total.get_total_tokens().get("", {})
    return found


class _Tracker(dspy_internals.USAGE_TRACKER.value or object):  # type: ignore[misc]
    def __deepcopy__(self, _memo: object) -> _Tracker:
        # DSPy gives each of its threads a copy, whose counts nobody would read.
        return self

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        record = call_records.current.get()
        if record is not None:
            record.usages.append(usage_entry)
        super().add_usage(lm, usage_entry)
