"""limiter: slots in the order of requests; a slot that is given up at any moment goes to the next waiter."""

from __future__ import annotations

import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspy_bridge.dispatch.call import Limiter


async def in_order() -> None:
    limiter = Limiter(2, 2)
    slots = []
    for _ in range(4):
        assert not limiter.full
        slots.append(limiter.slot())
    assert [slot.done() for slot in slots] == [True, True, False, False] and limiter.full
    limiter.leave(slots[2])
    assert not limiter.full
    limiter.release()
    assert slots[3].done() and (limiter.running, len(limiter.waiting)) == (2, 0)
    limiter.leave(slots[3])
    limiter.leave(slots[1])
    assert limiter.running == 0


def test_as_many_run_as_may_and_the_rest_waits_in_order() -> None:
    asyncio.run(in_order())


class LimiterInAnyOrder(RuleBasedStateMachine):
    """Ask, leave, acquire, release and cancel, with and without a step of the event loop in between."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.limiter = Limiter(3, 1_000_000)
        # Slots, taken or waited for; tasks that have one, and those that wait for one.
        self.slots: list[asyncio.Future[None]] = []
        self.running: list[asyncio.Task[None]] = []
        self.takers: list[asyncio.Task[None]] = []

    def teardown(self) -> None:
        self.settle()
        while self.running or self.takers or self.slots:
            if self.running:
                self.release(0)
            elif self.slots:
                self.leave(0)
            self.settle()
        assert (self.limiter.running, len(self.limiter.waiting)) == (0, 0)
        self.loop.close()

    @rule()
    def ask(self) -> None:
        self.slots.append(self.loop.run_until_complete(self._slot()))

    async def _slot(self) -> asyncio.Future[None]:
        return self.limiter.slot()

    @precondition(lambda self: self.slots)
    @rule(n=st.integers(0, 99))
    def leave(self, n: int) -> None:
        self.limiter.leave(self.slots.pop(n % len(self.slots)))

    @rule()
    def acquire(self) -> None:
        self.takers.append(self.loop.create_task(self.limiter.acquire()))

    @precondition(lambda self: self.running)
    @rule(n=st.integers(0, 99))
    def release(self, n: int) -> None:
        self.running.pop(n % len(self.running))
        self.limiter.release()

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
        taken = sum(slot.done() for slot in self.slots)
        assert self.limiter.running == len(self.running) + taken, "none is lost"
        assert len(self.limiter.waiting) == len(self.takers) + len(self.slots) - taken
        assert self.limiter.running == 3 or len(self.limiter.waiting) == 0, "a free slot goes to a waiter"

    @invariant()
    def never_more_than_may(self) -> None:
        assert len(self.running) <= self.limiter.running <= 3


TestLimiterInAnyOrder = LimiterInAnyOrder.TestCase
TestLimiterInAnyOrder.settings = settings(max_examples=100, stateful_step_count=40)
