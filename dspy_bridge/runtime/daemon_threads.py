"""A thread pool of daemon threads, which do not delay the exit of the process.

Python waits for the threads of a `ThreadPoolExecutor` before it exits, however long their work takes. The port program
exits without waiting; ErlPort's process would stay.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Executor, Future

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class DaemonThreads(Executor):
    """At most `most` threads, each started when all others are busy."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._unfinished = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `ThreadPoolExecutor.submit`. Raises RuntimeError if a thread is needed and cannot be started."""
        future: Future[Any] = Future()
        with self._lock:
            if self._threads <= self._unfinished and self._threads < self._most:
                name = f"{self._name}_{self._threads}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
                self._threads += 1
            self._unfinished += 1
        self._queue.put((future, lambda: fn(*args, **kwargs)))
        return future

    def _work(self) -> None:
        while True:
            # A function of its own, as locals would keep the last work alive while this waits.
            self._run(*self._queue.get())

    def _run(self, future: Future[Any], work: Callable[[], Any]) -> None:
        result: Any = None
        error: BaseException | None = None
        wanted = future.set_running_or_notify_cancel()
        if wanted:
            try:
                result = work()
            except StopIteration as raised:
                # asyncio's futures refuse it, and the waiter would wait for ever.
                error = RuntimeError("StopIteration was raised")
                error.__cause__ = raised
            except BaseException as raised:  # the waiter gets it
                error = raised
        with self._lock:
            # Before the future is done, so that the waiter's next work finds this thread free.
            self._unfinished -= 1
        if error is not None:
            future.set_exception(error)
            # Its traceback refers to this frame: break the cycle.
            del error, future
        elif wanted:
            future.set_result(result)
