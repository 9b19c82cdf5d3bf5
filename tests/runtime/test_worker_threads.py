"""worker_threads: what a call's threads wait for ends with the call."""

from __future__ import annotations

import asyncio
import contextvars
import threading

from dspy_bridge.runtime import worker_threads
from dspy_bridge.runtime.worker_threads import WorkerThreads

PATIENCE = 20.0


def test_what_other_threads_wait_for_is_given_up_if_the_work_raises() -> None:
    """As DSPy's threads do, whose requests to LMs nobody wants any more."""
    ended: list[str] = []
    others: list[threading.Thread] = []

    async def for_ever(waits: threading.Event) -> None:
        waits.set()
        await asyncio.Event().wait()

    def other(waits: threading.Event) -> None:
        job = worker_threads.current.get()
        assert job is not None
        try:
            job.on_loop(for_ever(waits))
        except asyncio.CancelledError:
            ended.append("cancelled")

    def work() -> None:
        waits = threading.Event()
        context = contextvars.copy_context()
        others.append(threading.Thread(target=context.run, args=(other, waits), daemon=True))
        others[0].start()
        assert waits.wait(PATIENCE)
        raise KeyError

    async def run() -> None:
        threads = WorkerThreads()
        try:
            await threads.run(work)
        except KeyError:
            assert threads.counts() == {"running": 0, "abandoned": 0, "max": 64}
        await asyncio.to_thread(others[0].join, PATIENCE)
        # The end of the loop would cancel it too.
        assert ended == ["cancelled"]

    asyncio.run(run())
