"""The W3C trace context (https://www.w3.org/TR/trace-context/) that a request came with. No DSPy here.

For user code: `from dspy_bridge import tracing`, then `tracing.current()` in a callback, a module or an LM.
"""

from __future__ import annotations

import sys
from contextvars import Context, ContextVar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_current: ContextVar[str | None] = ContextVar("traceparent", default=None)

# The name of the header, of the request's key, and of the setting through which DSPy passes it to its own threads.
TRACEPARENT = "traceparent"


def current() -> str | None:
    """The `traceparent` of the request that this code runs for; None if it came without one.

    It is available in tasks, in the threads of sync modules, in threads that DSPy starts (`dspy.Parallel`), and in any
    code that runs in a copy of their context.
    """
    traceparent = _current.get()
    if traceparent is None and (dspy := sys.modules.get("dspy")) is not None:
        # DSPy's threads have its settings, but no other context. While it is imported it has no settings yet.
        settings: Any = getattr(dspy, "settings", None)
        traceparent = None if settings is None else settings.get(TRACEPARENT)
    return traceparent


def context(traceparent: str | None) -> Context:
    """A new context for a request, which holds only its `traceparent`."""
    fresh = Context()
    if traceparent is not None:
        fresh.run(_current.set, traceparent)
    return fresh
