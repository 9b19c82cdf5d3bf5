"""An asyncio event loop that runs short steps inline; its connections keep no context of the run that opened them.

DSPy sends parts of each LM call (preparation, cache look-up, routing, pricing) through `asyncio.to_thread`: five
thread switches of some 100 µs each, more while other threads are busy, for steps of some 10 µs. Inline a run takes 5 %
less CPU with 64 in flight, a step of an agent 16 % less.

A step runs inline if `allow` names it and it has run in a thread before, for the same model: the first one may import a
provider's library.

asyncio keeps for each callback the context in which it was registered. A connection to a provider stays open, and its
context would keep all that the context variables refer to: DSPy's settings, its LMs, the arguments of the run. 20 runs
with 8 MB each left 300 MB.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import time
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any

from dspy_bridge.errors import BridgeError
from dspy_bridge.runtime.daemon_threads import DaemonThreads

_steps: frozenset[FunctionType] = frozenset()
# The most kinds of steps that are remembered, as a client may use any number of model names.
_MOST = 1000


def allow(steps: Iterable[FunctionType]) -> None:
    """The functions that may run inline, each with an LM or a request as its first argument."""
    global _steps
    _steps = frozenset(steps)


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

    def __init__(self, threads: str = "dspy_bridge-hop", inline: bool = True) -> None:
        """`threads`: the name of those of the default executor. `inline`: whether short steps run inline."""
        self.watched = WatchedSelector()
        super().__init__(self.watched)
        # More than Python's default of six, as user code may block some.
        self.set_default_executor(DaemonThreads(64, threads))
        self._inline = inline
        # The kinds of steps that have run in a thread.
        self._ran: set[Any] = set()

    def run_on_thread(self) -> None:
        """Run for ever, on a daemon thread."""
        while True:
            try:
                self.run_forever()
            except (SystemExit, KeyboardInterrupt):
                continue  # asyncio lets these two out of a task, which keeps them for its waiter

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]  # any callable
        """As asyncio's; the future may be done already."""
        kind = _kind(func) if executor is None and self._inline and not args else None
        if kind in self._ran:
            future = self.create_future()
            try:
                future.set_result(func())
            except BaseException as error:
                future.set_exception(error)
            return future
        future = super().run_in_executor(executor, func, *args)
        if kind is not None:
            if len(self._ran) >= _MOST:
                self._ran.clear()
            future.add_done_callback(lambda done: self._ran.update(() if done.cancelled() else (kind,)))
        return future

    # Private methods of asyncio. If they are gone, these are never called.

    def _add_reader(self, *args: Any) -> Any:
        return contextvars.Context().run(super()._add_reader, *args)  # type: ignore[misc]

    def _add_writer(self, *args: Any) -> Any:
        return contextvars.Context().run(super()._add_writer, *args)  # type: ignore[misc]


def _kind(fn: Callable[..., Any]) -> Any:
    """The key of a listed step, which `asyncio.to_thread` sends as `partial(context.run, step, lm, …)`; or None."""
    parts: tuple[Any, ...] = getattr(fn, "args", ())
    if len(parts) < 2:
        return None
    step: Any = parts[0]
    of = getattr(parts[1], "model", None)
    if isinstance(step, MethodType):
        # Each of its objects may begin with something long.
        step, of = step.__func__, id(step.__self__)
    # Other objects may not be hashable.
    return (step, of) if isinstance(step, FunctionType) and step in _steps else None


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
