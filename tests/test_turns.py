"""Whose turn it is, in the order of asking; a turn that is given up at any moment goes to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from dspy_bridge.turns import Turns


def test_as_many_run_as_may_and_the_rest_waits_in_order() -> None:
    turns, begun = Turns(2, 2), []

    def starter(n: int) -> Callable[[], object]:
        return lambda: begun.append(n)

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
