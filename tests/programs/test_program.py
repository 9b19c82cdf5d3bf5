"""program and lm_pool: where modules run, and LMs shared by equal options. With the real DSPy."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from typing import Any

import dspy
import pytest
from peer import PATIENCE

from dspy_bridge.lm import dspy_setup, lm_pool
from dspy_bridge.lm.offline import echo_lm, offline_lm
from dspy_bridge.programs import remote_tools
from dspy_bridge.programs.runners import Runner, ToolCallRunner
from dspy_bridge.runtime.worker_threads import WorkerThreads
from dspy_bridge.settings import Settings


class SyncOnly(dspy.Module):
    """A user's module without `aforward`."""

    def __init__(self, meet: threading.Barrier) -> None:
        super().__init__()
        self.meet = meet
        self.inner = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        self.meet.wait(20)
        return self.inner(question=question)


def test_a_module_with_only_a_sync_forward_runs_in_threads_with_dspys_context() -> None:
    """Two calls meet inside `forward` while the loop stays free; both see the LM of their caller's context."""
    module = SyncOnly(threading.Barrier(3))
    runner, threads = Runner(module), WorkerThreads()

    async def calls() -> list[Any]:
        with dspy.context(lm=offline_lm.OfflineLM(echo_lm.NAME, echo_lm.answer), callbacks=[offline_lm.WatchFormat()]):
            running = [asyncio.create_task(runner.run({"question": text}, threads)) for text in ("a", "b")]
            await asyncio.to_thread(module.meet.wait, 20)
            return await asyncio.gather(*running)

    assert [prediction.answer for prediction in asyncio.run(calls())] == ["echo: a", "echo: b"]


@pytest.fixture(scope="module")
def models() -> dspy_setup.LMs:
    return dspy_setup.LMs(Settings({}))


def test_all_lms_of_a_pool_are_closed_when_nobody_has_it_any_more(models: dspy_setup.LMs, start_lm: Any) -> None:
    """Not only the first one: each has an open connection to the provider."""
    server = start_lm()

    async def use() -> None:
        pool = lm_pool.LMPool({"model": "openai/x", **server.options()})
        with models.context(pool, None), ExitStack() as stack:
            lms = [stack.enter_context(pool.checkout()) for _ in range(lm_pool.CALLS_PER_LM * 2)]
            for lm in {id(lm): lm for lm in lms}.values():
                await lm.acall("hello")
        del pool
        for _ in range(3):
            assert await asyncio.to_thread(server.ended.acquire, timeout=PATIENCE)

    asyncio.run(use())


def test_a_program_with_tools_leaves_the_adapters_of_others_as_they_are() -> None:
    """Native function calling is set on a copy: DSPy's default adapter is shared."""
    (search,) = remote_tools.read([{"name": "search"}], set())
    runner = ToolCallRunner(dspy.Predict, dspy.Signature("question -> answer"), [search])
    default, chosen = dspy.ChatAdapter(use_native_function_calling=False), dspy.JSONAdapter()
    chosen.use_native_function_calling = False
    with dspy.context(adapter=default):
        for given, others in ((None, default), (chosen, chosen)):
            own = runner.adapter(given)
            assert type(own) is type(others) and own.use_native_function_calling
            assert not others.use_native_function_calling


def test_equal_options_share_an_lm_and_only_so_many_are_kept(models: dspy_setup.LMs) -> None:
    options = {"model": "openai/x", "temperature": 0.5, "api_key": "sk-1234567890"}
    first = models.pool(options)
    assert models.pool(dict(reversed(options.items()))) is first
    assert models.pool({**options, "temperature": 0.6}) is not first
    for number in range(200):
        models.pool({"model": f"openai/m{number}"})
    assert models._kept_pool.cache_info().currsize == dspy_setup.MAX_LMS
    assert models.pool(options) is not first


def test_a_pool_has_an_lm_for_every_hundred_calls_in_flight_and_uses_them_again(models: dspy_setup.LMs) -> None:
    pool = models.pool({"model": "openai/many"})

    for _ in range(2):
        with ExitStack() as stack:
            lms = [stack.enter_context(pool.checkout()) for _ in range(lm_pool.CALLS_PER_LM * 2 + 1)]
            assert len({id(lm) for lm in lms}) == 3
    with pool.checkout() as lm:
        assert lm is lms[0]
