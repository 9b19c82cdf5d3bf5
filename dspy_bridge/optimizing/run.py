"""The state of one optimization, which all its threads share: its budget, its counts, and how it ends. Imports DSPy."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any, NoReturn

import dspy

from dspy_bridge.dispatch.call import Call
from dspy_bridge.errors import BridgeError, BudgetSpent, OutputInvalid
from dspy_bridge.lm import lm_call
from dspy_bridge.lm.budgets import Budget
from dspy_bridge.lm.lm_call import Ended
from dspy_bridge.logs import peer_log
from dspy_bridge.optimizing import optimizers
from dspy_bridge.runtime import large_inputs, worker_threads

# So many calls of LMs that fail in a row end the run: DSPy would go on for hours with scores of 0.
_MOST_FAILURES = 10


class Run(lm_call.RunContext):
    """Carried in DSPy's settings, which DSPy's threads have; they have no other context.

    `ending`: done with the name of the spent budget, or with the error, if the run ends before its optimizer does;
    cancelled once it is over.
    """

    examples_once = True

    def __init__(self, call: Call, budget: optimizers.Budget) -> None:
        """On the event loop."""
        super().__init__(call.ends, call)
        # Of `student`, which finds itself by the run.
        self.student: Any = None
        # In a thread: the program that it has run last.
        self.here = threading.local()
        self.metric_calls = 0
        self.budget: Budget = Budget(budget.lm_calls, budget.tokens)
        self._loop = asyncio.get_running_loop()
        self.ending: Future[str | BaseException] = Future()
        self._lock = threading.Lock()
        # By the role of an LM, which is empty for that of the program: consecutive failures, and the last one.
        self._failures: Counter[str] = Counter()
        self._last_failure: dict[str, Exception] = {}
        # The roles whose LM has answered.
        self._answered: set[str] = set()
        self._large = False

    # From any thread.

    def end(self, why: str | BaseException) -> None:
        """End the run: with an error, or because the budget of that name is spent. The first reason counts."""
        with contextlib.suppress(InvalidStateError):
            self.ending.set_result(why)

    def close(self) -> None:
        """Whatever the run's code still does ends at its next step."""
        self.ending.cancel()

    def check(self) -> None:
        """Raises `Ended` once the run is over."""
        if self.ending.done():
            raise Ended

    def give_up(self, error: BridgeError) -> NoReturn:
        """By a spent budget the run ends as by its seconds: with the best so far."""
        self.end(error.which if isinstance(error, BudgetSpent) else error)
        raise Ended

    async def begin_request(self, tokens: int = 0) -> None:
        self.check()
        await super().begin_request(tokens)

    def count_metric_call(self) -> None:
        with self._lock:
            self.metric_calls += 1

    def lm_answered(self, role: str, error: Exception | None) -> None:
        """Count the failures of the LM of a role; many consecutive ones end the run.

        `error`: as `dspy_errors` has it. An answer that cannot be used is no failure of the LM: its candidate fails.
        """
        with self._lock:
            if error is None:
                self._answered.add(role)
                self._failures[role] = 0
                return
            self._last_failure[role] = error
            if isinstance(error, OutputInvalid):
                return
            self._failures[role] += 1
            down = self._failures[role] >= _MOST_FAILURES
        if down:
            self.end(error)

    def refuse_failures(self, *, stopped: bool = False) -> None:
        """Raises the last failure of an LM that has answered nothing: the scores mean nothing.

        `stopped`: the run has ended early, and keeps what it has if any LM has answered.
        """
        if stopped and self._answered:
            return
        for role, error in self._last_failure.items():
            if role not in self._answered:
                raise error

    # On an event loop.

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A slot of the peer's limiter: the run itself holds none, so that its LM calls and other runs take turns."""
        self.check()
        granted: Future[None] = Future()
        # The limiter belongs to the other loop if inputs are large.
        held = asyncio.run_coroutine_threadsafe(self._hold(granted), self._loop)
        try:
            await asyncio.wrap_future(granted)
            self.check()
            yield
        finally:
            held.cancel()

    async def _hold(self, granted: Future[None]) -> None:
        limiter = self.call.limiter
        slot = limiter.slot()
        try:
            await slot
            if granted.set_running_or_notify_cancel():
                granted.set_result(None)
            await self._loop.create_future()  # until it is cancelled
        finally:
            limiter.leave(slot)

    # In the run's threads.

    def begin(self) -> None:
        """Called first, in the thread of the optimizer."""
        peer_log.drop_where(lambda: current() is not None)
        self.job, self._large = worker_threads.current.get(), large_inputs.here.get()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Give a thread of DSPy's the context variables of the run. Raises `Ended` once the run is over."""
        self.check()
        job, large = worker_threads.current.set(self.job), large_inputs.here.set(self._large)
        try:
            yield
        finally:
            worker_threads.current.reset(job)
            large_inputs.here.reset(large)


def current() -> Run | None:
    """The optimization that this thread works for, if any."""
    run: Any = dspy.settings.get(lm_call.RUN)
    return run if isinstance(run, Run) else None
