"""Runs many inputs of one `execute_program`, each with its own slot of the limiter, its own result and, in an
evaluation, its score.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from statistics import fmean
from typing import Any

from dspy_bridge.dispatch import replies
from dspy_bridge.dispatch.call import Call
from dspy_bridge.dispatch.dispatcher import LONGEST_MS
from dspy_bridge.errors import Cancelled, TimedOut, hits_all
from dspy_bridge.programs.program import Program
from dspy_bridge.runtime import large_inputs

# Runs an item, which ends at that time of the loop at the latest, and has that index.
Work = Callable[[Any, float | None, int], Coroutine[Any, Any, Any]]
# What an item's result has in addition, from its index and its outputs.
Score = Callable[[int, dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]

# The items end so long before the request's deadline, in seconds: the client's own timeout runs out with the deadline,
# and the results must be there by then. Of a short timeout it is a tenth.
_EARLIER = 0.25
# So many items start in one turn of the event loop, some 0.3 ms each.
_AT_ONCE = 16


async def evaluate(args: dict[str, Any], program: Program, work: Work, call: Call) -> dict[str, Any]:
    """`{"score", "failed", "results"}`: those of a batch, each with its score, and the mean of all scores.

    A result that failed has the score 0. Without inputs the mean is None. Raises `ToolFailed` as soon as the metric
    fails, `LMFailed` or `LMNotConfigured` if an LM refuses the key, as it would for all.
    """
    metric = program.metric(args["metric"])
    expected = args.get("expected")
    examples = await large_inputs.in_thread(lambda: metric.examples(args["inputs"], expected, "expected"))

    async def score(index: int, outputs: dict[str, Any]) -> dict[str, Any]:
        value, feedback = await metric.score(examples[index][0], outputs, call)
        return {"score": value} if feedback is None else {"score": value, "feedback": feedback}

    results = await Batch(args, work, call, score).run()
    failed = sum(not result["success"] for result in results)
    scores = [result["score"] for result in results]
    return {"score": fmean(scores) if scores else None, "failed": failed, "results": results}


class Batch:
    """`args`: `inputs`, and `max_concurrency` and `item_timeout_ms`, if given.

    The first item uses the call's own slot. The others acquire theirs one at a time at the end of the queue, so that
    other calls run in between. If the call streams, each result is also sent when it is ready, with its index. Just
    before the call's deadline, all items without a result get the error `timeout`. `item_timeout_ms` counts from an
    item's start.

    With `score`, each failure has the score 0. An item has left its slot before it is scored: the score may need
    another run. What `score` raises ends the batch, and so does an LM that refuses the key.
    """

    def __init__(self, args: dict[str, Any], work: Work, call: Call, score: Score | None = None) -> None:
        self._items: list[Any] = args["inputs"]
        self._work = work
        self._call = call
        self._score = score
        self._item_ms: float | None = args.get("item_timeout_ms")
        most = args.get("max_concurrency") or len(self._items)
        if score is not None:
            # Those that wait for their score have no slot, and would be as many as the inputs.
            most = min(most, call.limiter.max_running)
        self._room = asyncio.Semaphore(most)
        # The items that have a slot.
        self._holding: set[int] = set()
        self._loop = asyncio.get_running_loop()
        # When all items end, in the loop's time.
        self._ends: float | None = None
        self._results: list[Any] = [None] * len(self._items)
        self._left = len(self._items)
        # Done with the last result, or at the deadline, however long cancelled work takes to notice.
        self._over: asyncio.Future[None] = self._loop.create_future()
        # With the timers of their items.
        self._tasks: dict[asyncio.Task[None], asyncio.TimerHandle | None] = {}

    async def run(self) -> list[dict[str, Any]]:
        """`{"success", "result"}` or `{"success", "error", "error_type"}` for each of the inputs, in their order."""
        if not self._items:
            return []
        expiry, deadline = None, self._call.deadline
        if deadline is not None:
            whole = self._call.request.timeout_ms or 0.0
            self._ends = deadline.when() - min(_EARLIER, whole / 10_000)
            expiry = self._loop.call_at(self._ends, self._expire, deadline, whole)
        starting = self._loop.create_task(self._start_all())
        try:
            await self._over
        finally:
            if expiry is not None:
                expiry.cancel()
            for task in (starting, *self._tasks):
                task.cancel()
        return self._results

    async def _start_all(self) -> None:
        for index in range(len(self._items)):
            await self._room.acquire()
            if self._call.slot_transferred:
                await self._call.limiter.acquire()
            self._call.slot_transferred = True
            self._holding.add(index)
            ends, timer = self._ends, None
            if self._item_ms is not None:
                own = self._loop.time() + min(self._item_ms, LONGEST_MS) / 1000
                ends = own if ends is None else min(own, ends)
            task = self._loop.create_task(self._one(index, ends))
            if self._item_ms is not None:
                timer = self._loop.call_at(own, self._item_late, index, task, self._item_ms)
            self._tasks[task] = timer
            task.add_done_callback(functools.partial(self._ended, index))
            # The first step checks the inputs and writes the prompt: other tasks run between hundreds of those. One at
            # a time, each would wake the LM's server and the loop for itself: 15 % more CPU.
            if index % _AT_ONCE == 0:
                await asyncio.sleep(0)

    async def _one(self, index: int, ends: float | None) -> None:
        try:
            outputs = await self._work(self._items[index], ends, index)
            result = {"success": True, "result": outputs}
            if self._score is not None and self._results[index] is None:
                self._release(index)
                result.update(await self._score(index, outputs))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # user code may raise anything
            scoring = index not in self._holding
            if self._score is not None and (scoring or hits_all(error)):
                if not self._over.done():
                    self._over.set_exception(error)
                return
            result = self._failure(error)
        if self._settle(index, result) and self._call.request.stream:
            # The slot is kept until there is room for more, which slows the batch of a client that does not read.
            await self._call.stream_item({"index": index, **result})

    def _ended(self, index: int, task: asyncio.Task[None]) -> None:
        # Not at the end of `_one`, which does not run if the task is cancelled before its first step.
        timer = self._tasks.pop(task)
        if timer is not None:
            timer.cancel()
        self._room.release()
        self._release(index)
        if self._results[index] is None:
            # Code of a user's may raise a CancelledError of its own.
            self._fail(index, self._failure(Cancelled("cancelled")))

    def _item_late(self, index: int, task: asyncio.Task[None], ms: float) -> None:
        self._fail(index, self._failure(TimedOut(f"not finished within {ms:g} ms")))
        task.cancel()

    def _expire(self, deadline: asyncio.TimerHandle, whole: float) -> None:
        # If the loop is late, the deadline is due with this, and would answer for all of them first.
        deadline.cancel()
        # Made once: there may be ten thousands of items, and the client's own timeout is near.
        result = self._failure(TimedOut(f"not finished within {whole:g} ms"))
        for index in range(len(self._items)):
            self._fail(index, result)

    def _failure(self, error: BaseException) -> dict[str, Any]:
        result = replies.describe(error)
        return result if self._score is None else {**result, "score": 0.0}

    def _fail(self, index: int, result: dict[str, Any]) -> None:
        if self._settle(index, result) and self._call.request.stream:
            self._call.stream_item_threadsafe({"index": index, **result})

    def _settle(self, index: int, result: dict[str, Any]) -> bool:
        """Keep the first result of an item; returns whether this is it."""
        if self._results[index] is not None or self._over.done():
            return False
        self._results[index] = result
        self._left -= 1
        if self._left == 0:
            self._over.set_result(None)
        return True

    def _release(self, index: int) -> None:
        """Free the item's slot, once."""
        if index in self._holding:
            self._holding.discard(index)
            self._call.limiter.release()
