"""Whose turn it is, in the order of asking; a turn that is given up at any moment goes to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspy_bridge.dispatch.limiter import Turns


def test_as_many_run_as_may_and_the_rest_waits_in_order() -> None:
    turns, begun = Turns(2, 2), []

    def starter(n: int) -> Callable[[], bool]:
        def start() -> bool:
            begun.append(n)
            return True

        return start

    starters = [starter(n) for n in range(4)]
    for start in starters:
        assert not turns.full
        turns.enter(start)
    assert begun == [0, 1] and turns.full and (turns.running, turns.waiting) == (2, 2)
    turns.withdraw(starters[2])
    assert not turns.full
    turns.leave()
    assert begun == [0, 1, 3] and (turns.running, turns.waiting) == (2, 0)
    turns.leave()
    turns.leave()
    assert turns.running == 0


@pytest.mark.parametrize("moment", ["waiting", "has come", "has come too late"])
def test_a_turn_that_is_given_up_is_the_next_ones(moment: str) -> None:
    """While it waits; when its turn has come, but not been taken yet; when its turn comes after all."""

    async def scenario() -> None:
        turns = Turns(1, 10)
        await turns.take()
        first, second = asyncio.create_task(turns.take()), asyncio.create_task(turns.take())
        await asyncio.sleep(0)
        assert (turns.running, turns.waiting) == (1, 2)
        if moment == "has come":
            turns.leave()
            first.cancel()
        elif moment == "has come too late":
            first.cancel()
            turns.leave()
        else:
            first.cancel()
            await asyncio.wait([first])
            assert turns.waiting == 1
            turns.leave()
        await asyncio.wait_for(second, 5)
        assert first.cancelled() and (turns.running, turns.waiting) == (1, 0)
        turns.leave()
        assert turns.running == 0

    asyncio.run(scenario())


def test_however_many_give_up_at_once_the_turn_is_free() -> None:
    """The turn comes to each of them before it has noticed that it was cancelled."""

    async def scenario() -> None:
        turns = Turns(1, 10_000)
        await turns.take()
        tasks = [asyncio.create_task(turns.take()) for _ in range(10_000)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        turns.leave()
        assert (turns.running, turns.waiting) == (0, 0)
        await asyncio.wait(tasks)
        assert (turns.running, turns.waiting) == (0, 0)
        await asyncio.wait_for(turns.take(), 5)

    asyncio.run(scenario())


class TurnsInAnyOrder(RuleBasedStateMachine):
    """Submit, acquire, release and cancel, with and without a step of the event loop in between."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.turns = Turns(3, 1_000_000)
        # Who was called and has not left; who was not called yet. By what `enter` was given, or by their task.
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
        assert (self.turns.running, self.turns.waiting) == (0, 0)
        self.loop.close()

    @rule()
    def submit(self) -> None:
        def start() -> bool:
            self.waiting.remove(start)
            self.running.append(start)
            self.called.append(start)
            return True

        self.waiting.append(start)
        self.turns.enter(start)

    @rule()
    def acquire(self) -> None:
        self.takers.append(self.loop.create_task(self.turns.take()))

    @precondition(lambda self: self.running)
    @rule(n=st.integers(0, 99))
    def release(self, n: int) -> None:
        self.running.pop(n % len(self.running))
        self.turns.leave()

    @precondition(lambda self: self.waiting)
    @rule(n=st.integers(0, 99))
    def withdraw(self, n: int) -> None:
        self.turns.withdraw(self.waiting.pop(n % len(self.waiting)))

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
        assert self.turns.running == len(self.running), "none is lost"
        assert self.turns.waiting == len(self.waiting) + len(self.takers)
        assert self.turns.running == 3 or self.turns.waiting == 0, "a free one goes to whoever waits"

    @invariant()
    def never_more_than_may(self) -> None:
        assert len(self.running) <= self.turns.running <= 3


TestTurnsInAnyOrder = TurnsInAnyOrder.TestCase
TestTurnsInAnyOrder.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
