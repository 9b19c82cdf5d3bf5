"""The event loop's default executor: DSPy's short steps run in place, everything else in threads.

DSPy sends parts of each LM call (preparing it, looking into the cache, pricing it) through `asyncio.to_thread`: four
hops of some 100 µs each, beside busy threads more, for steps of some 10 µs. Which executor those go to may be chosen.
With 64 executes in flight this makes them 12 % faster.

A step runs in place only if it is one of those below and was short in a thread several times before, for the same
model: the first one may import a provider's library. One that takes long in place sends its kind back to the threads.
Should DSPy rename one, it goes through a thread as before.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from dspy_bridge.runtime.daemon_threads import DaemonThreads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Not `capabilities`: for the same model it may need LiteLLM or not, and be the first to import it.
_STEPS = frozenset(("prepare", "_price_result"))
# With a disk cache these wait for the disk.
_CACHE_STEPS = frozenset(("_cached", "_store"))
_MODULE = "dspy.clients.execution"
# Seconds that the loop may be held up, and short runs in a thread before that is tried.
SHORT = 0.002
TRIES = 5
# Kinds of steps that are remembered; a host that makes up model names must not make the peer grow.
_MOST = 1000


class InlineExecutor(ThreadPoolExecutor):
    """To be set as a loop's default executor; used from that loop's thread.

    asyncio takes nothing but a `ThreadPoolExecutor` for that. Threads of that class's own are never started.
    """

    def __init__(self, *, memory_cache_only: bool) -> None:
        super().__init__(1)
        # More than Python's usual six: a host's own code may sit in some.
        self._daemons = DaemonThreads(64, "dspy_bridge-hop")
        self._steps = _STEPS | _CACHE_STEPS if memory_cache_only else _STEPS
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
        if getattr(step, "__module__", None) != _MODULE or getattr(step, "__name__", None) not in self._steps:
            return None
        return (step, getattr(parts[1], "model", None)) if len(parts) > 1 else None

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
