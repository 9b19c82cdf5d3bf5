"""program and lm_pool: where modules run, and LMs shared by equal options. With the real DSPy."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
import time
import weakref
from contextlib import ExitStack
from typing import Any

import dspy
import pytest
from peer import PATIENCE

from dspy_bridge.lm import dspy_setup, lm_pool
from dspy_bridge.lm.offline import echo_lm, offline_lm
from dspy_bridge.programs import remote_tools
from dspy_bridge.programs.program import Program
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
        with dspy.context(lm=echo_lm.EchoLM(), callbacks=[offline_lm.WatchFormat()]):
            running = [asyncio.create_task(runner.run({"question": text}, threads)) for text in ("a", "b")]
            await asyncio.to_thread(module.meet.wait, 20)
            return await asyncio.gather(*running)

    assert [prediction.answer for prediction in asyncio.run(calls())] == ["echo: a", "echo: b"]


@pytest.fixture(scope="module")
def models() -> dspy_setup.LMs:
    return dspy_setup.LMs(Settings({}))


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


@pytest.mark.parametrize("end", [ValueError, asyncio.CancelledError])
def test_a_call_that_fails_or_is_cancelled_gives_its_place_back(
    models: dspy_setup.LMs, end: type[BaseException]
) -> None:
    """With lost places each later call would open its own connections."""
    pool = models.pool({"model": "openai/places"})
    with pool.checkout() as first:
        pass
    for _ in range(lm_pool.CALLS_PER_LM):
        with pytest.raises(end), pool.checkout():
            raise end
    with pool.checkout() as lm:
        assert lm is first


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


TWO_STEP = {"adapter": {"name": "two_step", "extraction_model": {}}}
RLM = {"program_type": "rlm", "options": {"sub_lm": {}}}


@pytest.mark.parametrize("kind", [TWO_STEP, RLM], ids=["two_step", "rlm"])
def test_a_second_lm_of_a_program_that_is_gone_is_closed(
    models: dspy_setup.LMs, start_lm: Any, kind: dict[str, Any]
) -> None:
    """A two-step adapter or an RLM holds an LM, which keeps its pool alive exactly as long."""
    server = start_lm()
    definition: dict[str, Any] = json.loads(json.dumps({"signature": "question -> answer", **kind}))
    second = definition.get("options", {}).get("sub_lm", definition.get("adapter", {}).get("extraction_model"))
    second.update(server.options(model="openai/second"))
    models.settings = Settings({"allow_code": "1"})

    async def use() -> None:
        program = Program(definition, models, WorkerThreads())
        pool = weakref.ref(models.pool(second))
        for number in range(dspy_setup.MAX_LMS):
            models.pool({"model": f"openai/m{number}"})
        assert pool() is not None, "the program has it"
        with models.context(models.pool({"model": "offline/echo"}), None):
            await second_of(program).acall("hello")
        del program
        # The thread that ran its last step may hold its frame for a moment yet: the collection is what is repeated.
        deadline = time.monotonic() + PATIENCE
        while pool() is not None and time.monotonic() < deadline:
            await asyncio.to_thread(gc.collect)
        assert pool() is None
        assert await asyncio.to_thread(server.ended.acquire, timeout=PATIENCE)

    def second_of(program: Any) -> Any:
        return program._adapter.extraction_model if program._adapter else program.runner.module.sub_lm

    asyncio.run(use())


def test_what_grows_with_every_call_in_dspy_is_off_or_bounded(models: dspy_setup.LMs) -> None:
    assert dspy.settings.disable_history and dspy.settings.trace is None
    assert dspy.cache.memory_cache.maxsize == 10_000 and not dspy.cache.enable_disk_cache
    assert not dspy.settings.warn_on_type_mismatch, "its warnings quote inputs"
    assert os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] == "true", "else the first call fetches a price list"


def test_the_echo_lm_answers_a_plain_prompt_too() -> None:
    lm = echo_lm.EchoLM(api_key="ignored", temperature=0.3)
    assert isinstance(lm, dspy.BaseLM)
    assert lm("hello") == ["echo: hello"]
    assert asyncio.run(lm.acall("hello")) == ["echo: hello"]


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
