"""Runs one optimization: DSPy's optimizer in a thread, and the reply on the event loop. Imports DSPy."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from typing import Any

import dspy

from dspy_bridge.dispatch.call import Call, Limiter
from dspy_bridge.errors import InvalidArgs
from dspy_bridge.lm import dspy_errors
from dspy_bridge.lm.offline import offline_lm
from dspy_bridge.optimizing import optimizers, student
from dspy_bridge.optimizing.arguments import Optimize
from dspy_bridge.optimizing.candidates import Candidates
from dspy_bridge.optimizing.run import Run
from dspy_bridge.optimizing.watch import Watch, tolerant
from dspy_bridge.programs.program import Program
from dspy_bridge.programs.scores import Metric
from dspy_bridge.runtime import large_inputs, worker_threads
from dspy_bridge.runtime.worker_threads import WorkerThreads

# DSPy gives up after so many runs that failed. What ends an optimization is decided by `Student` and `Run`.
_MANY = 1_000_000_000
# What DSPy's optimizers raise for arguments that they cannot run with, mostly before an LM is asked.
_REFUSALS = (ArithmeticError, AssertionError, ImportError, TypeError, ValueError)


async def run(
    given: Optimize,
    program: Program,
    args: dict[str, Any],
    call: Call,
    limiter: Limiter,
    threads: WorkerThreads,
    *,
    stream: bool,
) -> dict[str, Any]:
    """`{"state", "score", "baseline", "candidates", "stopped", "lm_calls", "metric_calls"}`.

    `program`: one that nobody else has; it is changed. Raises `BridgeError`; any other exception is a defect.
    """
    inputs, expected = args["inputs"], args.get("expected")
    await large_inputs.in_thread(lambda: optimizers.check(given, len(inputs)))
    if expected is None and given.optimizer == "labeled_few_shot":
        raise InvalidArgs("expected: missing; labeled_few_shot makes demos of it")
    job = _Job(given, program, program.read_metric(args["metric"]), Run(call, limiter, given.budget))
    await large_inputs.in_thread(lambda: job.read(inputs, expected, stream=stream))
    return await job.run(args.get("lm"), threads)


class _Job:
    def __init__(self, given: Optimize, program: Program, metric: Metric, run: Run) -> None:
        self._given, self._program, self._metric, self._run = given, program, metric, run
        self._student = run.student = student.Student(program, metric, run)

    def read(self, inputs: list[Any], expected: list[Any] | None, *, stream: bool) -> None:
        """Raises `InvalidArgs` or `NotAllowed`."""
        given, program, valset = self._given, self._program, self._given.valset
        self._trainset = self._read(inputs, expected, "")
        self._valset = None if valset is None else self._read(valset.inputs, valset.expected, "optimize.valset.")
        self._module = self._student.module()
        self._candidates = Candidates(
            given.optimizer,
            optimizers.scored_on(given, len(inputs)),
            program.state(self._module),
            program.state,
            self._run,
            functools.partial(_send, self._run.call) if stream else None,
        )
        self._student.on_score = self._candidates.scored
        self._lms = {role: program.lm(lm, f"optimize.{role}") for role, lm in given.lms.items()}
        for role, own in self._lms.items():
            own.role = role  # its copies, which optimizers make, have it too
        self._large = large_inputs.are_large(self._run.call.size, [*inputs, *(valset.inputs if valset else ())])

    def _read(self, inputs: list[Any], expected: list[Any] | None, where: str) -> list[dspy.Example]:
        read = self._program.examples(self._metric, inputs, expected, where)
        self._student.examples.update((id(example), shown) for example, shown in read)
        return [example for example, _ in read]

    async def run(self, lm: object, threads: WorkerThreads) -> dict[str, Any]:
        loop, run = asyncio.get_running_loop(), self._run
        large_inputs.here.set(self._large)
        with self._program.optimizing(lm, run):
            # In the context: it has the settings.
            work = loop.create_task(threads.run(self._optimize))
        # If the run ends, nobody reads how its thread did.
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        ends = (work, asyncio.wrap_future(run.ending))
        try:
            done, _ = await asyncio.wait(ends, timeout=self._given.budget.seconds, return_when=asyncio.FIRST_COMPLETED)
            if work in done and not run.ending.done():
                return await self._result(work)
            why = run.ending.result() if done else "seconds"
            if isinstance(why, BaseException):
                raise why
            run.close()
            run.refuse_failures(stopped=True)
            return await large_inputs.in_thread(lambda: self._candidates.result(stopped=why))
        finally:
            run.close()
            work.cancel()

    async def _result(self, work: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
        try:
            return await work
        except Exception as error:
            known = dspy_errors.translate(error, [])
            if known is error and isinstance(error, _REFUSALS):
                raise InvalidArgs(f"optimize: DSPy's {self._given.optimizer} refuses it: {error}") from error
            raise known from error

    def _optimize(self) -> dict[str, Any]:
        """In a worker thread."""
        run, given = self._run, self._given
        run.begin()
        callbacks = [*dspy.settings.callbacks, Watch(run, self._candidates, optimizers.own_role(given))]
        if any(isinstance(lm, offline_lm.OfflineLM) for lm in self._lms.values()):
            callbacks.append(offline_lm.WatchFormat())
        settings: dict[str, Any] = {
            # DSPy's modules append to the trace, even if nobody reads it; without one BestOfN and Refine fail.
            "trace": deque(maxlen=0),
            "max_errors": _MANY,
            "callbacks": callbacks,
            "adapter": tolerant(dspy.settings.adapter or dspy.ChatAdapter()),
        }
        with dspy.context(**settings):
            made = optimizers.compile(given, self._module, self._trainset, self._valset, self._student, self._lms)
            run.refuse_failures()
            return self._candidates.result(made)


def _send(call: Call, item: dict[str, Any]) -> None:
    """An item of the stream; waits until the client can take more."""
    job = worker_threads.current.get()
    if job is None or "candidate" not in item:
        call.stream_item_threadsafe(item)
    else:
        job.on_loop(call.stream_item(item))
