"""Runs one optimization: DSPy's optimizer in a thread, and the reply on the event loop. Imports DSPy."""

from __future__ import annotations

import asyncio
import functools
import traceback
from collections import deque
from typing import Any

import dspy

from dspy_bridge.dispatch.call import Call
from dspy_bridge.errors import InvalidArgs
from dspy_bridge.lm import dspy_errors
from dspy_bridge.lm.adapters import choice
from dspy_bridge.lm.offline import offline_lm
from dspy_bridge.optimizing import optimizers
from dspy_bridge.optimizing.candidates import Candidates
from dspy_bridge.optimizing.run import Run
from dspy_bridge.optimizing.student import Student, Watch, tolerant
from dspy_bridge.programs import agents
from dspy_bridge.programs.program import Program
from dspy_bridge.runtime import large_inputs, worker_threads
from dspy_bridge.runtime.worker_threads import WorkerThreads

# DSPy gives up after so many runs that failed. What ends an optimization is decided by `Student` and `Run`.
_MANY = 1_000_000_000
# What DSPy's optimizers raise for arguments that they cannot run with, mostly before an LM is asked.
_REFUSALS = (ArithmeticError, AssertionError, ImportError, TypeError, ValueError)


async def read(args: dict[str, Any]) -> optimizers.Optimize:
    """The argument `optimize`, which can be run. Raises `InvalidArgs`."""
    given = await large_inputs.in_thread(lambda: optimizers.read(args["optimize"], len(args["inputs"])))
    if args.get("expected") is None and given.optimizer == "labeled_few_shot":
        raise InvalidArgs("expected: missing; labeled_few_shot makes demos of it")
    return given


async def run(
    given: optimizers.Optimize, program: Program, args: dict[str, Any], call: Call, threads: WorkerThreads
) -> dict[str, Any]:
    """`{"state", "score", "baseline", "candidates", "stopped", "lm_calls", "metric_calls"}`.

    `program`: one that nobody else has; it is changed. Raises `BridgeError`; any other exception is a defect.
    """
    run = Run(call, given.budget)
    job = await large_inputs.in_thread(lambda: _Job(given, program, args, run))
    large_inputs.here.set(job.large)
    with program.optimizing(args.get("lm"), run):
        # In the context: it has the settings.
        work = asyncio.get_running_loop().create_task(threads.run(job.optimize))
    # If the run ends, nobody reads how its thread did.
    work.add_done_callback(lambda done: done.cancelled() or done.exception())
    ends = (work, asyncio.wrap_future(run.ending))
    try:
        done, _ = await asyncio.wait(ends, timeout=given.budget.seconds, return_when=asyncio.FIRST_COMPLETED)
        if work in done and not run.ending.done():
            try:
                return await work
            except Exception as error:
                known = dspy_errors.translate(error, [])
                if known is error and isinstance(error, _REFUSALS):
                    raise InvalidArgs(f"optimize: DSPy's {given.optimizer} refuses it: {error}") from error
                raise known from error
        why = run.ending.result() if done else "seconds"
        if isinstance(why, BaseException):
            raise why
        run.close()
        run.refuse_failures(stopped=True)
        return await large_inputs.in_thread(lambda: job.candidates.result(stopped=why))
    finally:
        run.close()
        work.cancel()


class _Job:
    """What an optimization needs in its thread. `large`: whether its inputs are."""

    def __init__(self, given: optimizers.Optimize, program: Program, args: dict[str, Any], run: Run) -> None:
        """Blocks. Raises `InvalidArgs` or `NotAllowed`."""
        self._given, self._run = given, run
        self._student = run.student = student = Student(program, program.metric(args["metric"]), run)
        inputs, valset = args["inputs"], given.valset
        self._trainset, self._valset = student.examples(inputs, args.get("expected"), ""), None
        if valset is not None:
            self._valset = student.examples(valset.inputs, valset.expected, "optimize.valset.")
            inputs = [*inputs, *valset.inputs]
        self.large = large_inputs.are_large(run.call.size, inputs)
        self._lms = {role: program.lm(lm, f"optimize.{role}") for role, lm in given.lms.items()}
        for role, lm in self._lms.items():
            lm.role = role  # its copies, which optimizers make, have it too
        self._module = student.module()
        if given.optimizer == "labeled_few_shot":
            agents.refuse_labeled_demos(self._module)
        whole, start = optimizers.scored_on(given, len(self._trainset)), program.state(self._module)
        send = functools.partial(_send, run.call)
        self.candidates = Candidates(given.optimizer, whole, start, program.state, run, send)

    def optimize(self) -> dict[str, Any]:
        """In a worker thread."""
        given, run, candidates = self._given, self._run, self.candidates
        run.begin()
        callbacks = [*dspy.settings.callbacks, Watch(run, candidates, optimizers.own_role(given))]
        if any(isinstance(lm, offline_lm.OfflineLM) for lm in self._lms.values()):
            callbacks.append(offline_lm.WatchFormat())
        with dspy.context(
            # DSPy's modules append to the trace, even if nobody reads it; without one BestOfN and Refine fail.
            trace=deque(maxlen=0),
            max_errors=_MANY,
            callbacks=callbacks,
            adapter=tolerant(choice.default()),
        ):
            metric = self._student.metric(given.optimizer, candidates)
            try:
                made = optimizers.compile(given, self._module, self._trainset, self._valset, metric, self._lms)
            except BaseException as error:
                # DSPy's frames refer to it. Freed at any time, in any thread, gepa's progress bar would be logged.
                traceback.clear_frames(error.__traceback__)
                raise
            run.refuse_failures()
            return candidates.result(made)


def _send(call: Call, item: dict[str, Any]) -> None:
    """An item of the stream; a candidate's waits until the client can take more."""
    job = worker_threads.current.get()
    if not call.request.stream:
        return
    if job is None or "candidate" not in item:
        call.stream_item_threadsafe(item)
    else:
        job.on_loop(call.stream_item(item))
