"""The event loop's default executor: DSPy's short steps run in place, everything else in threads.

DSPy sends parts of each LM call (preparing it, looking into the cache, pricing it) through `asyncio.to_thread`: four
hops of some 100 µs each, beside busy threads more, for steps of some 10 µs. Which executor those go to may be chosen.
With 64 executes in flight this makes them 12 % faster.

A step runs in place only if `allow` names it and it was short in a thread several times before, for the same model: the
first one may import a provider's library. One that takes long in place sends its kind back to the threads.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import FunctionType

from dspy_bridge.runtime.daemon_threads import DaemonThreads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

# The functions that may run in place, and those that may unless there is a disk cache, which they wait for.
_steps: frozenset[FunctionType] = frozenset()
_cache_steps: frozenset[FunctionType] = frozenset()
# Seconds that the loop may be held up, and short runs in a thread before that is tried.
SHORT = 0.002
TRIES = 5
# Kinds of steps that are remembered; a host that makes up model names must not make the peer grow.
_MOST = 1000


def allow(steps: Iterable[FunctionType], cache_steps: Iterable[FunctionType]) -> None:
    """The functions that may run in place, each with an LM as its first argument; `cache_steps` look into the cache."""
    global _steps, _cache_steps
    _steps, _cache_steps = frozenset(steps), frozenset(cache_steps)


class InlineExecutor(ThreadPoolExecutor):
    """To be set as a loop's default executor; used from that loop's thread.

    asyncio takes nothing but a `ThreadPoolExecutor` for that. Threads of that class's own are never started.
    """

    def __init__(self, *, memory_cache_only: bool) -> None:
        super().__init__(1)
        # More than Python's usual six: a host's own code may sit in some.
        self._daemons = DaemonThreads(64, "dspy_bridge-hop")
        self._memory_cache_only = memory_cache_only
        self._short_runs: dict[Any, int] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `ThreadPoolExecutor`'s; the future may be done already."""
        kind = self._kind(fn)
        if kind is None:
            return self._daemons.submit(fn, *args, **kwargs)
        if self._short_runs.get(kind, 0) < TRIES:
            return self._daemons.submit(self._try, kind, fn)
        future: Future[Any] = Future()
        begin = time.perf_counter()
        try:
            future.set_result(fn())
        except BaseException as error:
            future.set_exception(error)
        if time.perf_counter() - begin > SHORT:
            self._short_runs[kind] = 0
        return future

    def _kind(self, fn: Callable[..., Any]) -> Any:
        """What `fn` is, if it is such a step as `asyncio.to_thread` sends it: `partial(context.run, step, lm, …)`."""
        parts: tuple[Any, ...] = getattr(fn, "args", ())
        step = parts[0] if parts else None
        if not isinstance(step, FunctionType) or len(parts) < 2:
            return None
        if step not in _steps and not (self._memory_cache_only and step in _cache_steps):
            return None
        return step, getattr(parts[1], "model", None)

    def _try(self, kind: Any, fn: Callable[[], Any]) -> Any:
        # CPU time: beside busy threads the clock says little about a step. Waiting shows once it runs in place.
        begin = time.thread_time()
        try:
            return fn()
        finally:
            if len(self._short_runs) > _MOST:
                self._short_runs.clear()
            short = time.thread_time() - begin < SHORT
            self._short_runs[kind] = self._short_runs.get(kind, 0) + 1 if short else 0
