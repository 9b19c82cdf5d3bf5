"""Counts the LM calls of one run and their tokens, for the `meta` of its reply."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from dspy.utils.callback import BaseCallback

from dspy_bridge.lm import dspy_internals

# Filled when the LM call under way in this context used tokens.
_used: ContextVar[list[bool] | None] = ContextVar("used", default=None)


class Meter(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    """A DSPy callback with a usage tracker for DSPy's settings, which is None where DSPy has none."""

    def __init__(self) -> None:
        counted = dspy_internals.USAGE_TRACKER.there and dspy_internals.USAGE_SETTING.there
        self.tracker: Any = _Tracker() if counted else None
        self._calls = 0
        self._cache_hits = 0

    def settings(self) -> dict[str, Any]:
        """DSPy's settings by which tokens are counted."""
        return {} if self.tracker is None else {dspy_internals.USAGE_SETTING.attribute: self.tracker}

    def summary(self) -> dict[str, Any]:
        """`{"lm_usage": {model: tokens}, "lm_calls", "cache_hits"}` up to now; a cached answer is a call too."""
        return {
            "lm_usage": {} if self.tracker is None else self.tracker.get_total_tokens(),
            "lm_calls": self._calls,
            "cache_hits": self._cache_hits,
        }

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Called by DSPy in the context of the LM call that follows."""
        self._calls += 1
        _used.set([])

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Called by DSPy, which tracks no usage for an answer from the cache."""
        if self.tracker is not None and exception is None and _used.get() == []:
            self._cache_hits += 1


class _Tracker(dspy_internals.USAGE_TRACKER.value or object):  # type: ignore[misc]
    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        used = _used.get()
        if used is not None:
            used.append(True)
        super().add_usage(lm, usage_entry)
