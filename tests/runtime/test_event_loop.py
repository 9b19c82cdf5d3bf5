"""event_loop: the steps that `allow` names run inline once they ran in a thread; connections keep no context."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, cast

import dspy
import pytest
from lm_server import LMServer

from dspy_bridge.lm import dspy_internals, dspy_setup
from dspy_bridge.runtime import event_loop
from dspy_bridge.runtime.event_loop import EventLoop
from dspy_bridge.settings import Settings


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
    before = event_loop._steps
    yield
    event_loop.allow(before)


def inline(allowed: list[Any], *calls: tuple[Callable[..., Any], LM]) -> list[Any]:
    event_loop.allow(cast("list[FunctionType]", allowed))

    async def main() -> list[Any]:
        return await asyncio.gather(
            *[await after(asyncio.to_thread(function, lm)) for function, lm in calls], return_exceptions=True
        )

    async def after(work: Any) -> asyncio.Future[Any]:
        task = asyncio.ensure_future(work)
        await asyncio.wait([task])
        return task

    loop = EventLoop()
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


def test_a_step_of_dspy_runs_inline_after_the_first_for_each_model() -> None:
    one, other = LM("one"), LM("other")
    assert inline([step], (step, one), (step, one), (step, one), (step, other)) == [False, True, True, False]
    assert inline([], *[(step, one)] * 3) == [False] * 3, "other code stays in threads"


def test_what_it_raises_reaches_the_waiter() -> None:
    assert [type(error) for error in inline([fail], *[(fail, LM("m"))] * 3)] == [KeyError] * 3


def test_a_method_runs_inline_after_the_first_call_of_each_object() -> None:
    """That may load credentials."""
    first, second, request = Engine(), Engine(), LM("any")
    assert inline([Engine.begins], *[(first.begins, request)] * 2, (second.begins, request)) == [False, True, False]


@pytest.mark.parametrize("disk_cache", ["", "cache"])
def test_the_short_steps_of_dspy_run_inline_after_the_first_call(
    start_lm: Callable[..., LMServer], disk_cache: str, tmp_path: Any
) -> None:
    """DSPy sends them to the executor in the way that is looked for; a cache on disk stays in threads."""
    steps = list(dspy_internals.STEPS)
    if not disk_cache:
        steps += dspy_internals.CACHE_STEPS
    dspy_setup.LMs(Settings({"disk_cache": disk_cache and str(tmp_path)}))
    lm = dspy.LM("openai/stub-model", **start_lm().options(cache=True))
    loop = EventLoop()

    async def ask() -> None:
        for number in range(3):
            await lm.acall(f"Question {number}?")

    loop.run_until_complete(ask())
    loop.close()
    assert {step for step, _of in loop._ran} == {step.value for step in steps}


under_way: contextvars.ContextVar[str] = contextvars.ContextVar("under_way", default="nothing")


def test_callbacks_of_descriptors_have_an_empty_context() -> None:
    read, write = os.pipe()
    loop = EventLoop()
    found: list[str] = []

    async def register() -> None:
        under_way.set("a call and its arguments")
        loop.add_reader(read, lambda: (found.append(under_way.get()), loop.stop()))
        loop.add_writer(write, lambda: (found.append(under_way.get()), loop.remove_writer(write)))
        os.write(write, b".")

    loop.create_task(register())
    loop.run_forever()
    loop.remove_reader(read)
    loop.close()
    os.close(read)
    os.close(write)
    assert sorted(set(found)) == ["nothing"]
