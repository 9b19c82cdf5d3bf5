"""A thread pool of daemon threads, which do not delay the exit of the process.

Python waits for the threads of a `ThreadPoolExecutor` before it exits, however long their work takes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class DaemonThreads(ThreadPoolExecutor):
    """At most `most` threads, each started when all others are busy.

    asyncio requires this class of its default executor; the threads of that are never started.
    """

    def __init__(self, most: int, name: str) -> None:
        super().__init__(1)
        self._most = most
        self._name = name
        self._work_items: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = self._unfinished = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `ThreadPoolExecutor.submit`. Raises RuntimeError if a thread is needed and cannot be started."""
        future: Future[Any] = Future()
        with self._lock:
            if self._started <= self._unfinished and self._started < self._most:
                threading.Thread(target=self._work, name=f"{self._name}_{self._started}", daemon=True).start()
                self._started += 1
            self._unfinished += 1
        self._work_items.put((future, lambda: fn(*args, **kwargs)))
        return future

    def _work(self) -> None:
        while True:
            # A function of its own, as locals would keep the last work alive while this waits.
            _run(*self._work_items.get())
            with self._lock:
                self._unfinished -= 1


def _run(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except StopIteration as error:
        # asyncio's futures refuse it, and the waiter would wait for ever.
        future.set_exception(RuntimeError(f"StopIteration was raised: {error}"))
    except BaseException as error:  # the waiter gets it
        future.set_exception(error)
        # Its traceback refers to this frame: break the cycle.
        del future
