"""program and dspy_setup: where modules run, and LMs shared by equal options. With the real DSPy."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import dspy
import pytest
from lm_server import chat
from peer import PATIENCE

from dspy_bridge.lm import dspy_setup
from dspy_bridge.lm.offline import echo_lm, offline_lm
from dspy_bridge.programs import remote_tools
from dspy_bridge.programs.runners import Runner, ToolCallRunner
from dspy_bridge.runtime.event_loop import EventLoop
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


def test_an_lms_connections_are_closed_when_nobody_has_it_any_more(models: dspy_setup.LMs, start_lm: Any) -> None:
    """Nor a copy of it. More than 100 calls at once have a connection each."""
    all_there = threading.Barrier(120)

    def answer(_request: Any) -> Any:
        all_there.wait(PATIENCE)
        return chat(answer="Paris")

    server = start_lm(answer)

    async def use() -> None:
        lm = dspy_setup.make_lm({"model": "openai/x", **server.options()})
        with models.context(lm.copy(), None):
            await asyncio.gather(*(lm.acall(f"hello {number}") for number in range(120)))
            del lm
            gc.collect()
            assert not server.ended.acquire(timeout=0.1)
        gc.collect()
        for _ in range(120):
            assert await asyncio.to_thread(server.ended.acquire, timeout=PATIENCE)

    loop = EventLoop()  # its connections keep no context, which has the LM
    loop.run_until_complete(use())
    loop.close()


def test_a_program_with_tools_leaves_the_adapters_of_others_as_they_are() -> None:
    """Native function calling is set on a copy: DSPy's default adapter is shared."""
    (search,) = remote_tools.read([{"name": "search"}], set())
    runner = ToolCallRunner(dspy.Predict, dspy.Signature("question -> answer"), [search])
    default = dspy.ChatAdapter(use_native_function_calling=False)
    with dspy.context(adapter=default):
        own = runner.adapter(None)
    assert type(own) is type(default) and own.use_native_function_calling
    assert not default.use_native_function_calling


def test_equal_options_share_an_lm_and_only_so_many_are_kept(models: dspy_setup.LMs) -> None:
    options = {"model": "openai/x", "temperature": 0.5, "api_key": "sk-1234567890"}
    first = models.lm(options)
    assert models.lm(dict(reversed(options.items()))) is first
    assert models.lm({**options, "temperature": 0.6}) is not first
    for number in range(200):
        models.lm({"model": f"openai/m{number}"})
    assert models._kept_lm.cache_info().currsize == dspy_setup.MAX_LMS
    assert models.lm(options) is not first
