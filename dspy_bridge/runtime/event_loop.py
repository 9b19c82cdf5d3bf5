"""An asyncio event loop that runs short steps inline; its connections keep no context of the run that opened them.

asyncio keeps for each callback the context in which it was registered. A connection to a provider stays open, and its
context would keep all that the context variables refer to: DSPy's settings, its LMs, the arguments of the run. 20 runs
with 8 MB each left 300 MB.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import time
from typing import Any

from dspy_bridge.errors import BridgeError
from dspy_bridge.runtime.daemon_threads import DaemonThreads
from dspy_bridge.runtime.inline_executor import InlineExecutor


class WatchedSelector(selectors.DefaultSelector):
    """A selector that notes when its loop turns."""

    def __init__(self) -> None:
        super().__init__()
        # When the present turn began, by `time.monotonic`; None while the loop waits.
        self.turn_began: float | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.turn_began = None
        ready = super().select(timeout)
        self.turn_began = time.monotonic()
        return ready


class EventLoop(asyncio.SelectorEventLoop):
    """Callbacks of descriptors get an empty context, as transports need none."""

    def __init__(self, executor: DaemonThreads | None = None) -> None:
        """`executor`: the default one; an `InlineExecutor` if it is None."""
        self.watched = WatchedSelector()
        super().__init__(self.watched)
        self._executor = executor or InlineExecutor()
        self.set_default_executor(self._executor)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]  # any callable
        """As asyncio's; the future may be done already."""
        if executor is None and not args and isinstance(self._executor, InlineExecutor):
            future = self._executor.run_inline(func, self.create_future)
            if future is not None:
                return future
        return super().run_in_executor(executor, func, *args)

    # Private methods of asyncio. If they are gone, these are never called.

    def _add_reader(self, *args: Any) -> Any:
        return contextvars.Context().run(super()._add_reader, *args)  # type: ignore[misc]

    def _add_writer(self, *args: Any) -> Any:
        return contextvars.Context().run(super()._add_writer, *args)  # type: ignore[misc]


def refuse_sync_call() -> None:
    """Raise for a sync call of an LM in a coroutine on one of these loops: all other runs would wait for its answer."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    if isinstance(loop, EventLoop):
        raise BridgeError(
            "a module called an LM synchronously in its aforward, which would block all other runs: "
            "instead of self.predict(…) write await self.predict.acall(…)"
        )
