"""inline_executor: DSPy's steps run inline once they were short several times; nothing else does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from dspy_bridge.runtime import inline_executor


class LM:
    def __init__(self, model: str) -> None:
        self.model = model


def step(name: str, work: Callable[[], object] = lambda: None) -> Callable[[LM], bool]:
    """A function like DSPy's; returns whether it ran on the loop's thread."""

    def run(_lm: LM) -> bool:
        work()
        return threading.current_thread() is threading.main_thread()

    run.__name__, run.__module__ = name, "dspy.clients.execution"
    return run


def in_place(*calls: tuple[Callable[..., bool], LM], memory_cache_only: bool = True) -> list[bool]:
    async def main() -> list[bool]:
        executor = inline_executor.InlineExecutor(memory_cache_only=memory_cache_only)
        asyncio.get_running_loop().set_default_executor(executor)
        return [await asyncio.to_thread(function, lm) for function, lm in calls]

    return asyncio.run(main())


def test_a_short_step_of_dspy_runs_in_place_after_some_tries_for_each_model() -> None:
    prepare, one, other = step("prepare"), LM("one"), LM("other")
    calls = [(prepare, one)] * (inline_executor.TRIES + 2) + [(prepare, other)]
    assert in_place(*calls) == [False] * inline_executor.TRIES + [True, True, False]


def test_a_step_that_was_long_never_does() -> None:
    def busy() -> None:
        end = time.thread_time() + inline_executor.SHORT * 2
        while time.thread_time() < end:
            pass

    assert in_place(*[(step("prepare", busy), LM("m"))] * (inline_executor.TRIES + 2)) == [False] * (
        inline_executor.TRIES + 2
    )


def test_one_that_waits_in_place_goes_back_to_the_threads() -> None:
    waits = step("prepare", lambda: threading.Event().wait(inline_executor.SHORT * 2))
    found = in_place(*[(waits, LM("m"))] * (inline_executor.TRIES + 2))
    assert found == [False] * inline_executor.TRIES + [True, False]


@pytest.mark.parametrize(("name", "memory_only"), [("users_own", True), ("_cached", False), ("_store", False)])
def test_other_code_and_a_cache_on_disk_stay_in_threads(name: str, memory_only: bool) -> None:
    calls = [(step(name), LM("m"))] * (inline_executor.TRIES + 2)
    assert in_place(*calls, memory_cache_only=memory_only) == [False] * (inline_executor.TRIES + 2)


def test_what_it_raises_reaches_who_waits() -> None:
    def fail() -> None:
        raise KeyError("x")

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(inline_executor.InlineExecutor(memory_cache_only=True))
        function = step("prepare", fail)
        for _ in range(inline_executor.TRIES + 2):
            with pytest.raises(KeyError):
                await asyncio.to_thread(function, LM("m"))

    asyncio.run(main())


def test_dspys_own_steps_are_known() -> None:
    """If DSPy renames them, runs get slower: find the new names."""
    from dspy.clients import execution

    assert (
        execution.__name__ == inline_executor._MODULE
        and set(vars(execution)) >= inline_executor._STEPS | inline_executor._CACHE_STEPS
    )
