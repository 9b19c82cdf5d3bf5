"""The W3C trace context (https://www.w3.org/TR/trace-context/) of a request. Does not import DSPy.

For user code: `from dspy_bridge import tracing`, then `tracing.current()` in a callback, a module or an LM.
"""

from __future__ import annotations

import sys
from contextvars import Context, ContextVar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_current: ContextVar[str | None] = ContextVar("traceparent", default=None)

# The name of the header, and of the key in a request.
TRACEPARENT = "traceparent"
# The DSPy setting whose `traceparent` DSPy's threads have: see `lm/lm_call`.
RUN = "dspy_bridge_run"


def current() -> str | None:
    """The `traceparent` of the current request; None if it has none.

    Works in tasks, in threads of sync modules, in those that DSPy starts (`dspy.Parallel`), and wherever their context
    is copied.
    """
    traceparent = _current.get()
    if traceparent is None and (dspy := sys.modules.get("dspy")) is not None:
        # DSPy's threads have its settings, but no other context. During its import there are no settings yet.
        settings: Any = getattr(dspy, "settings", None)
        traceparent = getattr(None if settings is None else settings.get(RUN), "traceparent", None)
    return traceparent


def context(traceparent: str | None) -> Context:
    """A new context that has only this."""
    fresh = Context()
    if traceparent is not None:
        fresh.run(_current.set, traceparent)
    return fresh
