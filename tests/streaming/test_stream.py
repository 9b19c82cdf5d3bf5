"""streaming: what one stream leaves to the others on the event loop. DSPy and its echo LM are the real ones."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import dspy

from dspy_bridge.lm import dspy_setup
from dspy_bridge.programs.program import Program
from dspy_bridge.runtime.worker_threads import WorkerThreads
from dspy_bridge.settings import Settings


class Told:
    """What a program asks of its call; `turns`: how many the event loop had taken when each chunk was told."""

    meter = None
    size = 100

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


def test_a_stream_that_never_waits_leaves_turns_to_the_others() -> None:
    """An LM in this process, as `offline/echo`, may have its whole answer at once."""
    told = Told()

    async def main() -> None:
        program = Program(
            {"signature": "question -> answer", "lm": {"model": "offline/echo"}},
            dspy_setup.Models(Settings({})),
            WorkerThreads(),
        )
        counting = asyncio.create_task(told.count())
        with dspy.context():
            await program.call({"question": "x " * 10_000}, None, None, cast(Any, told), stream=True)
        counting.cancel()

    asyncio.run(main())
    assert len(told.turns) > 9000
    assert len(set(told.turns)) > 3
