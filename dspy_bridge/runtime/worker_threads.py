"""Worker threads for modules that have only a sync `forward`. Does not import DSPy.

A thread cannot be killed. When a run is cancelled its LM request is cancelled, further ones are refused, and its thread
counts as abandoned until it returns. The number of threads is limited, so code that never returns can block all of
them, but nothing else.
"""

from __future__ import annotations

import sys
import threading
from contextvars import ContextVar

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future
    from contextvars import Context
    from typing import Any, TypeVar

    from dspy_bridge.runtime.daemon_threads import DaemonThreads

    T = TypeVar("T")

# Not those of the event loop's executor, which every async LM call of DSPy needs.
MAX_THREADS = 64
# How long a busy thread keeps the interpreter, in seconds. With 8 busy threads the slowest ping took 165 ms at Python's
# default of 0.005 and 32 ms at this; with 64 of them 438 and 143 ms.
SWITCH_INTERVAL = 0.0005


class Job:
    def __init__(self, loop: asyncio.AbstractEventLoop, lm_loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lm_loop = lm_loop
        self._lock = threading.Lock()
        self._given_up = False
        self._waiting: set[Future[Any]] = set()
        self._endings: list[Callable[[], object]] = []

    def on_loop(self, work: Coroutine[Any, Any, T], lm: bool = False) -> T:
        """Run `work` on the event loop, where it can be cancelled, and wait for it. On the worker thread.

        `lm`: on the loop of this call's LM requests, which with large inputs is the second one.
        """
        import asyncio
        from concurrent.futures import CancelledError

        with self._lock:
            if self._given_up:
                work.close()
                raise asyncio.CancelledError("nobody waits for this call any more")
            future = asyncio.run_coroutine_threadsafe(work, self._lm_loop if lm else self.loop)
            self._waiting.add(future)
        try:
            return future.result()
        except CancelledError:
            # That of `concurrent.futures` is an Exception, which code in the thread might handle as a failure.
            raise asyncio.CancelledError("nobody waits for this call any more") from None
        finally:
            with self._lock:  # several threads may share a job
                self._waiting.discard(future)

    def on_give_up(self, end: Callable[[], object]) -> None:
        """Call `end`, which stops what this thread has started, when the call is given up, or now if it was."""
        with self._lock:
            self._endings.append(end)
            given_up = self._given_up
        if given_up:
            end()

    def give_up(self) -> None:
        """Cancel what runs on the loops and refuse what follows, as nobody waits for the call any more."""
        with self._lock:
            self._given_up = True
            waiting = list(self._waiting)
            endings = list(self._endings)
        for future in waiting:
            future.cancel()
        for end in endings:
            end()


# The job of this worker thread, and of threads that it starts with its context.
current: ContextVar[Job | None] = ContextVar("job", default=None)


def current_job() -> Job:
    job = current.get()
    assert job is not None, "expected to run in a worker thread"
    return job


class WorkerThreads:
    """At most `MAX_THREADS` worker threads."""

    def __init__(self) -> None:
        self._pool: DaemonThreads | None = None
        self._lock = threading.Lock()
        self._running = self._abandoned = 0
        self._usual_interval = sys.getswitchinterval()

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread, with the caller's context variables. Cancelling gives it up.

        If it raises, what other threads do for it is given up too.
        """
        import asyncio
        import contextvars

        from dspy_bridge.runtime import large_inputs
        from dspy_bridge.runtime.daemon_threads import DaemonThreads

        if self._pool is None:
            self._pool = DaemonThreads(MAX_THREADS, "dspy_bridge-sync")
        loop = asyncio.get_running_loop()
        job = Job(loop, large_inputs.loop() if large_inputs.here.get() else loop)
        context = contextvars.copy_context()
        context.run(current.set, job)
        future = self._pool.submit(self._counted, context, work)
        try:
            return await asyncio.wrap_future(future)
        except BaseException:
            job.give_up()
            if future.running():
                self._count(abandoned=1)
                future.add_done_callback(lambda _: self._count(abandoned=-1))
            raise

    def counts(self) -> dict[str, int]:
        """`{"running", "abandoned", "max"}`; the abandoned ones are among the running."""
        return {"running": self._running, "abandoned": self._abandoned, "max": MAX_THREADS}

    def _counted(self, context: Context, work: Callable[[], T]) -> T:
        self._count(running=1)
        try:
            return context.run(work)
        finally:
            self._count(running=-1)

    def _count(self, running: int = 0, abandoned: int = 0) -> None:
        with self._lock:
            self._running += running
            self._abandoned += abandoned
            # Only while such code runs, as more switches cost everything else a little.
            sys.setswitchinterval(SWITCH_INTERVAL if self._running else self._usual_interval)
