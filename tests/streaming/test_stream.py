"""stream: a stream yields to other tasks of the event loop. With the real DSPy."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import dspy

from dspy_bridge.lm import dspy_setup
from dspy_bridge.programs.program import Program
from dspy_bridge.runtime.worker_threads import WorkerThreads
from dspy_bridge.settings import Settings


class FakeCall:
    """The parts of a call that a program uses. `turns`: iterations of the event loop before each chunk."""

    meter = None
    size = 100
    ends = None

    def __init__(self) -> None:
        self.turns: list[int] = []
        self.turn = 0

    async def stream_item(self, item: dict[str, Any]) -> None:
        assert item["field"] == "answer"
        self.turns.append(self.turn)

    async def count(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)


def test_a_stream_that_never_waits_yields_to_other_tasks() -> None:
    """An LM in this process, such as `offline/echo`, may have its whole answer at once."""
    call = FakeCall()

    async def main() -> None:
        program = Program(
            {"signature": "question -> answer", "lm": {"model": "offline/echo"}},
            dspy_setup.Models(Settings({})),
            WorkerThreads(),
        )
        counting = asyncio.create_task(call.count())
        with dspy.context():
            await program.call({"question": "x " * 10_000}, None, None, cast(Any, call), stream=True)
        counting.cancel()

    asyncio.run(main())
    assert len(call.turns) > 9000
    assert len(set(call.turns)) > 3
