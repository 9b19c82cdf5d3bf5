"""programs and models: modules run where they can, LMs are shared by equal options. DSPy is the real one."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import ExitStack
from typing import Any

import dspy
import pytest

from dspy_bridge import echo, models
from dspy_bridge.runners import Runner
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
    runner = Runner(module)

    async def calls() -> list[Any]:
        with dspy.context(lm=echo.EchoLM(), callbacks=[echo.WatchFormat()]):
            running = [asyncio.create_task(runner.run({"question": text})) for text in ("a", "b")]
            await asyncio.to_thread(module.meet.wait, 20)
            return await asyncio.gather(*running)

    assert [prediction.answer for prediction in asyncio.run(calls())] == ["echo: a", "echo: b"]


@pytest.fixture(scope="module")
def lms() -> models.Models:
    return models.Models(Settings({}))


def test_equal_options_share_an_lm_and_only_so_many_are_kept(lms: models.Models) -> None:
    options = {"model": "openai/x", "temperature": 0.5, "api_key": "sk-1234567890"}
    first = lms.pool(options)
    assert lms.pool(dict(reversed(options.items()))) is first
    assert lms.pool({**options, "temperature": 0.6}) is not first
    for number in range(200):
        lms.pool({"model": f"openai/m{number}"})
    assert len(lms._pools) == models.MAX_LMS
    assert lms.pool(options) is not first


def test_a_pool_has_an_lm_for_every_hundred_calls_in_flight_and_uses_them_again(lms: models.Models) -> None:
    pool = lms.pool({"model": "openai/many"})

    async def lend() -> None:
        for _ in range(2):
            with ExitStack() as stack:
                lent = [stack.enter_context(pool.lend()) for _ in range(models.CALLS_PER_LM * 2 + 1)]
                assert len({id(lm) for lm in lent}) == 3
                assert lent[0] is pool.first
        with pool.lend() as lm:
            assert lm is pool.first

    asyncio.run(lend())


def test_what_grows_with_every_call_in_dspy_is_off_or_bounded(lms: models.Models) -> None:
    assert dspy.settings.disable_history and dspy.settings.trace is None
    assert dspy.cache.memory_cache.maxsize == 10_000 and not dspy.cache.enable_disk_cache
    assert not dspy.settings.warn_on_type_mismatch, "its warnings quote inputs"
    assert os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] == "true", "else the first call fetches a price list"


def test_the_echo_lm_answers_a_plain_prompt_too() -> None:
    lm = echo.EchoLM(api_key="ignored", temperature=0.3)
    assert isinstance(lm, dspy.BaseLM)
    assert lm("hello") == ["echo: hello"]
    assert asyncio.run(lm.acall("hello")) == ["echo: hello"]
