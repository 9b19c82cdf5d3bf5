"""The event loop's default executor: runs DSPy's short steps inline, everything else in threads.

DSPy sends parts of each LM call (preparation, cache look-up, routing, pricing) through `asyncio.to_thread`: five
thread switches of some 100 µs each, more while other threads are busy, for steps of some 10 µs. Inline they take 10 %
less CPU with 64 runs in flight, and 16 % less with one.

A step runs inline if `allow` names it and it has run in a thread before, for the same model: the first one may import a
provider's library.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import FunctionType, MethodType

from dspy_bridge.runtime.daemon_threads import DaemonThreads

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable
    from typing import Any

# The functions that may run inline, and those that may without a disk cache, which they would wait for.
_steps: frozenset[FunctionType] = frozenset()
_cache_steps: frozenset[FunctionType] = frozenset()
# The most kinds of steps that are remembered, as a client may use any number of model names.
_MOST = 1000


def allow(steps: Iterable[FunctionType], cache_steps: Iterable[FunctionType]) -> None:
    """The functions that may run inline, each with an LM or a request as its first argument; `cache_steps` look into
    the cache."""
    global _steps, _cache_steps
    _steps, _cache_steps = frozenset(steps), frozenset(cache_steps)


class InlineExecutor(ThreadPoolExecutor):
    """The default executor of one event loop, used from its thread.

    asyncio requires a `ThreadPoolExecutor`, but the threads of that class are never started.
    """

    def __init__(self, *, memory_cache_only: bool) -> None:
        super().__init__(1)
        # More than Python's default of six, as user code may block some.
        self._daemons = DaemonThreads(64, "dspy_bridge-hop")
        self._memory_cache_only = memory_cache_only
        # The kinds of steps that have run in a thread.
        self._ran: set[Any] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `ThreadPoolExecutor.submit`."""
        future = self._daemons.submit(fn, *args, **kwargs)
        if (kind := self._kind(fn)) is not None:
            if len(self._ran) >= _MOST:
                self._ran.clear()
            future.add_done_callback(lambda _: self._ran.add(kind))
        return future

    def run_inline(
        self, fn: Callable[..., Any], make_future: Callable[[], asyncio.Future[Any]]
    ) -> asyncio.Future[Any] | None:
        """Run `fn` now if it is such a step, and return a future that is done; else None."""
        if self._kind(fn) not in self._ran:
            return None
        future = make_future()
        try:
            future.set_result(fn())
        except BaseException as error:
            future.set_exception(error)
        return future

    def _kind(self, fn: Callable[..., Any]) -> Any:
        """The key of a listed step, which `asyncio.to_thread` sends as `partial(context.run, step, lm, …)`; or None."""
        parts: tuple[Any, ...] = getattr(fn, "args", ())
        if len(parts) < 2:
            return None
        step: Any = parts[0]
        of = getattr(parts[1], "model", None)
        if isinstance(step, MethodType):
            # Each of its objects may begin with something long.
            step, of = step.__func__, id(step.__self__)
        if not isinstance(step, FunctionType):
            return None  # it may not be hashable
        return (step, of) if step in _steps or (self._memory_cache_only and step in _cache_steps) else None
