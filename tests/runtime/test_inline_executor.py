"""inline_executor: the steps that `allow` names run inline once they were short several times; nothing else does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from dspy_bridge.runtime import inline_executor
from dspy_bridge.runtime.event_loop import EventLoop

T = TypeVar("T")


class LM:
    def __init__(self, model: str) -> None:
        self.model = model


def step(work: Callable[[], object] = lambda: None, *, in_cache: bool = False) -> Callable[[LM], bool]:
    """A step that may run inline; returns whether it ran on the loop's thread."""

    def run(_lm: LM) -> bool:
        work()
        return threading.current_thread() is threading.main_thread()

    inline_executor.allow(*(([], [run]) if in_cache else ([run], [])))  # type: ignore[list-item]
    return run


@pytest.fixture(autouse=True)
def steps_as_before() -> Iterator[None]:
    before = inline_executor._steps, inline_executor._cache_steps
    yield
    inline_executor.allow(*before)


def in_place(*calls: tuple[Callable[..., bool], LM], memory_cache_only: bool = True) -> list[bool]:
    async def main() -> list[bool]:
        return [await asyncio.to_thread(function, lm) for function, lm in calls]

    return run(main(), memory_cache_only=memory_cache_only)


def run(work: Coroutine[Any, Any, T], *, memory_cache_only: bool = True) -> T:
    loop = EventLoop()
    loop.set_default_executor(inline_executor.InlineExecutor(memory_cache_only=memory_cache_only))
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


def test_a_short_step_of_dspy_runs_in_place_after_some_tries_for_each_model() -> None:
    prepare, one, other = step(), LM("one"), LM("other")
    calls = [(prepare, one)] * (inline_executor.TRIES + 2) + [(prepare, other)]
    assert in_place(*calls) == [False] * inline_executor.TRIES + [True, True, False]


def test_a_step_that_was_long_never_does() -> None:
    def busy() -> None:
        end = time.thread_time() + inline_executor.SHORT * 2
        while time.thread_time() < end:
            pass

    assert in_place(*[(step(busy), LM("m"))] * (inline_executor.TRIES + 2)) == [False] * (inline_executor.TRIES + 2)


def test_one_that_waits_in_place_goes_back_to_the_threads() -> None:
    waits = step(lambda: threading.Event().wait(inline_executor.SHORT * 2))
    found = in_place(*[(waits, LM("m"))] * (inline_executor.TRIES + 2))
    assert found == [False] * inline_executor.TRIES + [True, False]


@pytest.mark.parametrize("memory_only", [True, False])
def test_a_cache_on_disk_stays_in_threads(memory_only: bool) -> None:
    calls = [(step(in_cache=True), LM("m"))] * (inline_executor.TRIES + 1)
    assert in_place(*calls, memory_cache_only=memory_only) == [False] * inline_executor.TRIES + [memory_only]


def test_other_code_stays_in_threads() -> None:
    users_own = step()
    inline_executor.allow([], [])
    assert in_place(*[(users_own, LM("m"))] * (inline_executor.TRIES + 2)) == [False] * (inline_executor.TRIES + 2)


def test_what_it_raises_reaches_who_waits() -> None:
    def fail() -> None:
        raise KeyError("x")

    async def main() -> None:
        function = step(fail)
        for _ in range(inline_executor.TRIES + 2):
            with pytest.raises(KeyError):
                await asyncio.to_thread(function, LM("m"))

    run(main())


class Engine:
    def begins(self, _request: LM) -> bool:
        return threading.current_thread() is threading.main_thread()


def test_a_method_runs_in_place_after_some_tries_with_each_object() -> None:
    """The first call of one may load credentials."""
    inline_executor.allow([Engine.begins], [])  # type: ignore[list-item]
    first, second, request = Engine(), Engine(), LM("any")
    calls = [(first.begins, request)] * (inline_executor.TRIES + 1) + [(second.begins, request)]
    assert in_place(*calls) == [False] * inline_executor.TRIES + [True, False]
