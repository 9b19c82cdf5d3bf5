"""run: the slots of an optimization's LM calls, which may be made on another event loop than the limiter's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from dspy_bridge.dispatch.call import Limiter
from dspy_bridge.optimizing.optimizers import Budget
from dspy_bridge.optimizing.run import Run


@pytest.fixture
def other() -> Iterator[asyncio.AbstractEventLoop]:
    """The event loop for large inputs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def turns() -> None:
    """Let the loop do all that is ready."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("moment", ["waiting", "has come"])
def test_a_slot_that_is_given_up_is_the_next_ones(other: asyncio.AbstractEventLoop, moment: str) -> None:
    """Cancelled while it waits, or when it has a slot but does not know yet."""

    async def scenario() -> None:
        limiter = Limiter(1, 10)
        await limiter.acquire()
        call: Any = SimpleNamespace(ends=None, limiter=limiter)
        run = Run(call, Budget())
        tasks: list[asyncio.Task[None]] = []
        asked, stopped, go_on = threading.Event(), threading.Event(), threading.Event()

        async def ask() -> None:
            async with run.slot():
                raise AssertionError("it was cancelled")

        def begin() -> None:
            tasks.append(other.create_task(ask()))
            other.call_soon(asked.set)

        def stop() -> None:
            stopped.set()
            assert go_on.wait(20)

        other.call_soon_threadsafe(begin)
        assert await asyncio.to_thread(asked.wait, 20)
        await turns()
        assert len(limiter.waiting) == 1
        # The cancel is the first that the other loop learns after this.
        other.call_soon_threadsafe(stop)
        assert await asyncio.to_thread(stopped.wait, 20)
        other.call_soon_threadsafe(tasks[0].cancel)
        if moment == "has come":
            limiter.release()
            await turns()
        go_on.set()
        if moment == "waiting":
            await asyncio.to_thread(lambda: asyncio.run_coroutine_threadsafe(turns(), other).result(20))
            await turns()
            assert len(limiter.waiting) == 0
            limiter.release()
        await asyncio.wait_for(limiter.acquire(), 20)
        assert (limiter.running, len(limiter.waiting)) == (1, 0)

    asyncio.run(scenario())
