"""Many inputs of one execute: each takes its turn like an execute of its own, and has a result of its own."""

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

    The call's own turn is that of its first item; for the others it waits, one at a time and behind whoever waits
    already, so that other executes get their turns in between. With `stream`, each result is told as soon as it is
    there, with its index.
    """
    results: list[Any] = [None] * len(items)
    limiter = call.services.limiter
    tasks: set[asyncio.Task[None]] = set()

    async def one(index: int) -> None:
        try:
            results[index] = {"success": True, "result": await work(items[index])}
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a module of the host's own may raise anything
            results[index] = call.services.describe(error)
        if stream:
            await call.stream_item({"index": index, **results[index]})

    def ended(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        # Not at the end of `one`: a task that is cancelled before its first step runs none of it.
        limiter.release()

    try:
        for index in range(len(items)):
            if call.slot_transferred:
                await limiter.acquire()
            call.slot_transferred = True
            task = asyncio.get_running_loop().create_task(one(index))
            tasks.add(task)
            task.add_done_callback(ended)
            # Until it first waits, its inputs are checked and written into a prompt: not hundreds of them at a stretch.
            await asyncio.sleep(0)
        while tasks:
            await asyncio.wait(tasks)
    finally:
        for task in list(tasks):
            task.cancel()
    return results
