"""What one execute asked of LMs, for the `meta` of its reply."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from dspy.utils.callback import BaseCallback
from dspy.utils.usage_tracker import UsageTracker

# Of the LM call that is under way in this context: whether it used tokens.
_used: ContextVar[list[bool] | None] = ContextVar("used", default=None)


class Meter(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    """Counts LM calls and their tokens, by way of DSPy's callbacks and its usage tracker."""

    def __init__(self) -> None:
        self.tracker = _Tracker()
        self._calls = 0
        self._cache_hits = 0

    def summary(self) -> dict[str, Any]:
        """`{"lm_usage": {model: tokens}, "lm_calls", "cache_hits"}` up to now; a cached answer is a call, too."""
        return {
            "lm_usage": self.tracker.get_total_tokens(),
            "lm_calls": self._calls,
            "cache_hits": self._cache_hits,
        }

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Called by DSPy in the context of the LM call that follows."""
        self._calls += 1
        _used.set([])

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Called by DSPy: what the cache has answered is tracked by no usage."""
        if exception is None and _used.get() == []:
            self._cache_hits += 1


class _Tracker(UsageTracker):  # type: ignore[misc]
    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        used = _used.get()
        if used is not None:
            used.append(True)
        super().add_usage(lm, usage_entry)
