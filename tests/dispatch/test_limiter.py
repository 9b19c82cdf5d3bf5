"""limiter: slots in the order of requests; a slot that is given up at any moment goes to the next waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspy_bridge.dispatch.limiter import Limiter


def test_as_many_run_as_may_and_the_rest_waits_in_order() -> None:
    limiter, begun = Limiter(2, 2), []

    def starter(n: int) -> Callable[[], bool]:
        def start() -> bool:
            begun.append(n)
            return True

        return start

    starters = [starter(n) for n in range(4)]
    for start in starters:
        assert not limiter.full
        limiter.submit(start)
    assert begun == [0, 1] and limiter.full and (limiter.running, limiter.waiting) == (2, 2)
    limiter.withdraw(starters[2])
    assert not limiter.full
    limiter.release()
    assert begun == [0, 1, 3] and (limiter.running, limiter.waiting) == (2, 0)
    limiter.release()
    limiter.release()
    assert limiter.running == 0


@pytest.mark.parametrize("moment", ["waiting", "has come", "has come too late"])
def test_a_turn_that_is_given_up_is_the_next_ones(moment: str) -> None:
    """Cancelled while it waits; when it has a slot but does not know yet; when it gets one after the cancel."""

    async def scenario() -> None:
        limiter = Limiter(1, 10)
        await limiter.acquire()
        first, second = asyncio.create_task(limiter.acquire()), asyncio.create_task(limiter.acquire())
        await asyncio.sleep(0)
        assert (limiter.running, limiter.waiting) == (1, 2)
        if moment == "has come":
            limiter.release()
            first.cancel()
        elif moment == "has come too late":
            first.cancel()
            limiter.release()
        else:
            first.cancel()
            await asyncio.wait([first])
            assert limiter.waiting == 1
            limiter.release()
        await asyncio.wait_for(second, 5)
        assert first.cancelled() and (limiter.running, limiter.waiting) == (1, 0)
        limiter.release()
        assert limiter.running == 0

    asyncio.run(scenario())


def test_however_many_give_up_at_once_the_turn_is_free() -> None:
    """Each gets the slot before it has noticed its cancellation."""

    async def scenario() -> None:
        limiter = Limiter(1, 10_000)
        await limiter.acquire()
        tasks = [asyncio.create_task(limiter.acquire()) for _ in range(10_000)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        limiter.release()
        assert (limiter.running, limiter.waiting) == (0, 0)
        await asyncio.wait(tasks)
        assert (limiter.running, limiter.waiting) == (0, 0)
        await asyncio.wait_for(limiter.acquire(), 5)

    asyncio.run(scenario())


class LimiterInAnyOrder(RuleBasedStateMachine):
    """Submit, acquire, release and cancel, with and without a step of the event loop in between."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.limiter = Limiter(3, 1_000_000)
        # Holders of a slot, and waiters: the functions given to `submit`, or tasks.
        self.running: list[Any] = []
        self.waiting: list[Callable[[], bool]] = []
        self.takers: list[asyncio.Task[None]] = []
        self.called: list[Any] = []

    def teardown(self) -> None:
        self.settle()
        while self.running or self.takers or self.waiting:
            if self.running:
                self.release(0)
            self.settle()
        assert (self.limiter.running, self.limiter.waiting) == (0, 0)
        self.loop.close()

    @rule()
    def submit(self) -> None:
        def start() -> bool:
            self.waiting.remove(start)
            self.running.append(start)
            self.called.append(start)
            return True

        self.waiting.append(start)
        self.limiter.submit(start)

    @rule()
    def acquire(self) -> None:
        self.takers.append(self.loop.create_task(self.limiter.acquire()))

    @precondition(lambda self: self.running)
    @rule(n=st.integers(0, 99))
    def release(self, n: int) -> None:
        self.running.pop(n % len(self.running))
        self.limiter.release()

    @precondition(lambda self: self.waiting)
    @rule(n=st.integers(0, 99))
    def withdraw(self, n: int) -> None:
        self.limiter.withdraw(self.waiting.pop(n % len(self.waiting)))

    @precondition(lambda self: self.takers)
    @rule(n=st.integers(0, 99))
    def cancel(self, n: int) -> None:
        self.takers[n % len(self.takers)].cancel()

    @rule()
    def step(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))
        for task in [task for task in self.takers if task.done()]:
            self.takers.remove(task)
            if not task.cancelled():
                self.running.append(task)

    @rule()
    def settle(self) -> None:
        for _ in range(4):
            self.step()
        assert self.limiter.running == len(self.running), "none is lost"
        assert self.limiter.waiting == len(self.waiting) + len(self.takers)
        assert self.limiter.running == 3 or self.limiter.waiting == 0, "a free slot goes to a waiter"

    @invariant()
    def never_more_than_may(self) -> None:
        assert len(self.running) <= self.limiter.running <= 3


TestLimiterInAnyOrder = LimiterInAnyOrder.TestCase
TestLimiterInAnyOrder.settings = settings(max_examples=100, stateful_step_count=40)
