"""The event loop's default executor: runs DSPy's short steps inline, everything else in threads.

DSPy sends parts of each LM call (preparation, cache look-up, routing, pricing) through `asyncio.to_thread`: five
thread switches of some 100 µs each, more while other threads are busy, for steps of some 10 µs. Inline a run takes 5 %
less CPU with 64 in flight, a step of an agent 16 % less.

A step runs inline if `allow` names it and it has run in a thread before, for the same model: the first one may import a
provider's library.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from types import FunctionType, MethodType
from typing import Any

from dspy_bridge.runtime.daemon_threads import DaemonThreads

_steps: frozenset[FunctionType] = frozenset()
# The most kinds of steps that are remembered, as a client may use any number of model names.
_MOST = 1000


def allow(steps: Iterable[FunctionType]) -> None:
    """The functions that may run inline, each with an LM or a request as its first argument."""
    global _steps
    _steps = frozenset(steps)


class InlineExecutor(DaemonThreads):
    """The default executor of one event loop, used from its thread."""

    def __init__(self) -> None:
        # More than Python's default of six, as user code may block some.
        super().__init__(64, "dspy_bridge-hop")
        # The kinds of steps that have run in a thread.
        self._ran: set[Any] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        if (kind := _kind(fn)) is not None:
            if len(self._ran) >= _MOST:
                self._ran.clear()
            future.add_done_callback(lambda _: self._ran.add(kind))
        return future

    def run_inline(
        self, fn: Callable[..., Any], make_future: Callable[[], asyncio.Future[Any]]
    ) -> asyncio.Future[Any] | None:
        """Run `fn` now if it is such a step, and return a future that is done; else None."""
        if _kind(fn) not in self._ran:
            return None
        future = make_future()
        try:
            future.set_result(fn())
        except BaseException as error:
            future.set_exception(error)
        return future


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
