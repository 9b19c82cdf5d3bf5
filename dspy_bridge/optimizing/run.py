"""The state of one optimization, which all its threads share: its budget, its counts, and how it ends. Imports DSPy."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import dspy

from dspy_bridge.caller import Caller
from dspy_bridge.dispatch.limiter import Limiter
from dspy_bridge.errors import OutputInvalid
from dspy_bridge.lm.transport import admission
from dspy_bridge.logs import library_output
from dspy_bridge.optimizing.arguments import Budget
from dspy_bridge.runtime import worker_threads

# So many calls of LMs that fail in a row end the run: DSPy would go on for hours with scores of 0.
_MOST_FAILURES = 10


class Ended(BaseException):
    """Unwinds DSPy's code once a run is over. Not an `Exception`, as DSPy catches those and goes on."""


class Run(admission.Run):
    """Carried in DSPy's settings, which DSPy's threads have; they have no other context.

    `ending`: done with the name of the spent budget, or with the error, if the run ends before its optimizer does.
    """

    __slots__ = (
        "_budget",
        "_context",
        "_failures",
        "_last_failure",
        "_limiter",
        "_lms_work",
        "_lock",
        "_loop",
        "_over",
        "call",
        "ending",
        "here",
        "lm_calls",
        "metric_calls",
        "student",
        "tokens",
    )

    def __init__(self, call: Caller, limiter: Limiter, budget: Budget) -> None:
        """On the event loop."""
        super().__init__(call.ends)
        self.call = call
        # Of `student`, which finds itself by the run.
        self.student: Any = None
        # In a thread: the program that it has run last.
        self.here = threading.local()
        self.lm_calls = 0
        self.metric_calls = 0
        self.tokens = 0
        self._budget = budget
        self._limiter = limiter
        self._loop = asyncio.get_running_loop()
        self.ending: asyncio.Future[str | BaseException] = self._loop.create_future()
        self._lock = threading.Lock()
        self._over = False
        # In a row.
        self._failures = 0
        self._last_failure: Exception | None = None
        self._lms_work = False
        self._context: contextvars.Context | None = None

    # From any thread.

    def end(self, why: str | BaseException) -> None:
        """End the run: with an error, or because the budget of that name is spent. The first reason counts."""
        with self._lock:
            if self._over:
                return
            self._over = True
        self._loop.call_soon_threadsafe(self._settle, why)

    def close(self) -> None:
        """Whatever the run's code still does ends at its next step."""
        with self._lock:
            self._over = True
        # It has this run and its LMs: as a cycle they would stay, with their connections, until garbage is collected.
        self._context = None

    def check(self) -> None:
        """Raises `Ended` once the run is over."""
        if self._over:
            raise Ended

    def request(self) -> None:
        """Count a request to an LM. Raises `Ended` if the budget has none left."""
        with self._lock:
            if self._over:
                raise Ended
            spent = self._budget.lm_calls is not None and self.lm_calls >= self._budget.lm_calls
            self.lm_calls += not spent
        if spent:
            self.end("lm_calls")
            raise Ended

    def spend(self, tokens: int) -> None:
        """Count the tokens of an answer."""
        with self._lock:
            self.tokens += tokens
            spent = self._budget.tokens is not None and self.tokens >= self._budget.tokens
        if spent:
            self.end("tokens")

    def count_metric_call(self) -> None:
        """Count a call of the metric."""
        with self._lock:
            self.metric_calls += 1

    def lm_answered(self, error: Exception | None) -> None:
        """Count failures of LMs; many in a row end the run. `error`: as `dspy_errors` has it.

        An answer that was cut off is one only until an LM has given a whole one: else it is the candidate's.
        """
        with self._lock:
            self._lms_work = self._lms_work or error is None
            of_candidate = error is None or (isinstance(error, OutputInvalid) and self._lms_work)
            self._failures = 0 if of_candidate else self._failures + 1
            self._last_failure = error
            down = self._failures >= _MOST_FAILURES
        if error is not None and down:
            self.end(error)

    def refuse_failures(self) -> None:
        """Raises the last failure of an LM if there was nothing else: all scores would be 0."""
        if self._last_failure is not None and not self._lms_work:
            raise self._last_failure

    # On an event loop.

    def slot(self) -> AbstractAsyncContextManager[None]:
        """A slot of the peer's limiter: the run itself holds none, so that its LM calls and other runs take turns."""
        return self._slot()

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        self.check()
        here = asyncio.get_running_loop() is self._loop
        if here:
            await self._limiter.acquire()
        else:  # of large inputs
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._limiter.acquire(), self._loop))
        try:
            self.check()
            yield
        finally:
            if here:
                self._limiter.release()
            else:
                self._loop.call_soon_threadsafe(self._limiter.release)

    def _settle(self, why: str | BaseException) -> None:
        if not self.ending.done():
            self.ending.set_result(why)

    # In the run's threads.

    def begin(self) -> None:
        """Called first, in the thread of the optimizer."""
        library_output.drop_where(lambda: current() is not None)
        self._context = contextvars.copy_context()
        self.job = worker_threads.current.get()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Give a thread of DSPy's the context variables of the run. Raises `Ended` once the run is over."""
        self.check()
        context = self._context
        if context is None:  # closed since then
            raise Ended
        here = contextvars.copy_context()
        tokens = [(variable, variable.set(value)) for variable, value in context.items() if variable not in here]
        try:
            yield
        finally:
            for variable, token in reversed(tokens):
                variable.reset(token)


def current() -> Run | None:
    """The optimization that this thread works for, if any."""
    run: Any = dspy.settings.get(admission.RUN)
    return run if isinstance(run, Run) else None
