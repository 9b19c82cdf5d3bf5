"""Runs many inputs of one `execute_program`, each with its own slot of the limiter and its own result."""

from __future__ import annotations

import asyncio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from dspy_bridge.dispatch.call import Call


async def run(
    items: list[Any], work: Callable[[Any], Coroutine[Any, Any, Any]], call: Call, *, stream: bool
) -> list[dict[str, Any]]:
    """`{"success", "result"}` or `{"success", "error", "error_type"}` for each item, in their order.

    The first item uses the call's own slot. The others acquire theirs one at a time at the end of the queue, so that
    other calls run in between. With `stream`, each result is also sent when it is ready, with its index.
    """
    results: list[Any] = [None] * len(items)
    limiter = call.services.limiter
    tasks: set[asyncio.Task[None]] = set()

    async def one(index: int) -> None:
        try:
            results[index] = {"success": True, "result": await work(items[index])}
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # user code may raise anything
            results[index] = call.services.describe(error)
        if stream:
            await call.stream_item({"index": index, **results[index]})

    def ended(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        # Not at the end of `one`, which does not run if the task is cancelled before its first step.
        limiter.release()

    try:
        for index in range(len(items)):
            if call.slot_transferred:
                await limiter.acquire()
            call.slot_transferred = True
            task = asyncio.get_running_loop().create_task(one(index))
            tasks.add(task)
            task.add_done_callback(ended)
            # The first step checks the inputs and writes the prompt: other tasks run between hundreds of those.
            await asyncio.sleep(0)
        while tasks:
            await asyncio.wait(tasks)
    finally:
        for task in list(tasks):
            task.cancel()
    return results
