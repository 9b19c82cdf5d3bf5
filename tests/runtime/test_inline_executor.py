"""inline_executor: the steps that `allow` names run inline once they ran in a thread; nothing else does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspy_bridge.runtime import inline_executor
from dspy_bridge.runtime.event_loop import EventLoop


class LM:
    def __init__(self, model: str) -> None:
        self.model = model


def step(_lm: object) -> bool:
    return threading.current_thread() is threading.main_thread()


def fail(_lm: object) -> None:
    raise KeyError("x")


class Engine:
    def begins(self, _request: LM) -> bool:
        return step(self)


@pytest.fixture(autouse=True)
def steps_as_before() -> Iterator[None]:
    before = inline_executor._steps, inline_executor._cache_steps
    yield
    inline_executor.allow(*before)


def inline(*calls: tuple[Callable[..., bool], LM], memory_cache_only: bool = True) -> list[bool]:
    async def main() -> list[bool]:
        return [await asyncio.to_thread(function, lm) for function, lm in calls]

    loop = EventLoop()
    loop.set_default_executor(inline_executor.InlineExecutor(memory_cache_only=memory_cache_only))
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


def test_a_step_of_dspy_runs_inline_after_the_first_for_each_model() -> None:
    inline_executor.allow([step], [])  # type: ignore[list-item]
    one, other = LM("one"), LM("other")
    assert inline((step, one), (step, one), (step, one), (step, other)) == [False, True, True, False]


@pytest.mark.parametrize("memory_only", [True, False])
def test_a_cache_on_disk_stays_in_threads(memory_only: bool) -> None:
    inline_executor.allow([], [step])  # type: ignore[list-item]
    assert inline(*[(step, LM("m"))] * 2, memory_cache_only=memory_only) == [False, memory_only]


def test_other_code_stays_in_threads() -> None:
    inline_executor.allow([], [])
    assert inline(*[(step, LM("m"))] * 3) == [False] * 3


def test_what_it_raises_reaches_the_waiter() -> None:
    inline_executor.allow([fail], [])  # type: ignore[list-item]

    async def raises(lm: LM) -> None:
        for _ in range(3):
            with pytest.raises(KeyError):
                await asyncio.to_thread(fail, lm)

    loop: Any = EventLoop()
    loop.set_default_executor(inline_executor.InlineExecutor(memory_cache_only=True))
    loop.run_until_complete(raises(LM("m")))
    loop.close()


def test_a_method_runs_inline_after_the_first_call_of_each_object() -> None:
    """That may load credentials."""
    inline_executor.allow([Engine.begins], [])  # type: ignore[list-item]
    first, second, request = Engine(), Engine(), LM("any")
    assert inline(*[(first.begins, request)] * 2, (second.begins, request)) == [False, True, False]
