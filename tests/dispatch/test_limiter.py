"""limiter: slots in the order of requests; a slot that is given up at any moment goes to the next waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

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
