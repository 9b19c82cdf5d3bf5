"""Lets requests to LMs go as the limits of their accounts allow, on event loops and in threads. Imports DSPy.

Each HTTP request passes here, those of DSPy's retries too; what the cache answers does not.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from typing import Any

import dspy

from dspy_bridge.errors import Overloaded
from dspy_bridge.lm.rate_limits import INFINITE, Gate, Ticket
from dspy_bridge.lm.transport import asking
from dspy_bridge.runtime import worker_threads
from dspy_bridge.runtime.worker_threads import Job

# The DSPy setting that has the `Run`: DSPy's threads have its settings, but no other context.
RUN = "dspy_bridge_run"
# The statuses by which a server refuses a request that it may take later.
_REFUSALS = (429, 503)


class LMOverloaded(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """A request would have to wait past the deadline of its run. `begun`: whether the run has asked LMs or tools."""

    def __init__(self, text: str, begun: bool) -> None:
        super().__init__(text)
        self.begun = begun


class Run:
    """`deadline`: of a run, in seconds of `time.monotonic`, or None; `steps`: calls of LMs and tools that it made."""

    __slots__ = ("deadline", "job", "steps")

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        # For threads that have DSPy's settings, but no other context.
        self.job: Job | None = None
        self.steps = 0

    def slot(self) -> AbstractAsyncContextManager[None] | None:
        """What a call of an LM waits for, on its event loop, and leaves at its end; None by default."""
        return None

    def request(self) -> None:
        """Called before each request to an LM's server, from any thread."""

    def not_sent(self) -> None:
        """Called if the request was not sent after all: it was refused, or cancelled as it waited."""

    def overloaded(self, text: str) -> LMOverloaded:
        """The error for a request of the latest step."""
        return LMOverloaded(text, self.steps > 1)


# The calls that wait now.
_waiting: set[Times] = set()


def waiting() -> int:
    """How many calls of LMs wait for the limits of their account."""
    return len(_waiting)


class Times:
    """How long a call of an LM has waited, and when its answer began. In seconds of `time.monotonic`.

    `first_chunk`: when the first piece of a streamed answer was received; None without one.
    """

    __slots__ = ("_since", "_waited", "first_chunk")

    def __init__(self) -> None:
        self.first_chunk: float | None = None
        self._waited = 0.0
        self._since: float | None = None

    def begin_wait(self) -> None:
        """The call waits from now on, unless it does already."""
        if self._since is None:
            self._since = time.monotonic()
            _waiting.add(self)

    def end_wait(self) -> None:
        """It waits no longer: its next request is sent."""
        self._waited, self._since = self.waited(time.monotonic()), None
        self.first_chunk = None
        _waiting.discard(self)

    def waited(self, until: float) -> float:
        """How long it has waited until then."""
        return self._waited + (0.0 if self._since is None else max(0.0, until - self._since))

    def chunk(self) -> None:
        """A piece of a streamed answer was received."""
        if self.first_chunk is None:
            self.first_chunk = time.monotonic()


class _Call:
    """A call of an LM. Its requests follow one another."""

    __slots__ = ("gate", "leave", "run", "times")

    def __init__(self, gate: Gate, run: Run) -> None:
        self.gate = gate
        self.run = run
        self.times = Times()
        self.leave: Callable[[], None] = _nothing


def _nothing() -> None:
    pass


_call: ContextVar[_Call | None] = ContextVar("admission", default=None)


def times() -> Times:
    """Those of the LM call under way."""
    call = _call.get()
    return Times() if call is None else call.times


def step() -> Run:
    """The run under way, which has come to a call of an LM or a tool. An empty one outside of runs."""
    run: Run = dspy.settings.get(RUN) or Run(None)
    run.steps += 1
    return run


def job() -> Job | None:
    """By which a sync call of an LM in this thread can be cancelled, if it can."""
    found = worker_threads.current.get()
    if found is None and not _on_loop():
        run: Run | None = dspy.settings.get(RUN)
        found = None if run is None else run.job
    return found


@contextmanager
def of(gate: Gate | None) -> Iterator[None]:
    """Around a call of an LM. At its end its place is free, whoever forgot to close an answer."""
    if gate is None:
        yield
        return
    call = _Call(gate, step())
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)
        call.leave()
        # It may have ended while it waited.
        _waiting.discard(call.times)


async def admit() -> Callable[[], None]:
    """Return once the next request of the call under way may be sent; what to call when its answer has ended.

    Raises `LMOverloaded`.
    """
    call = _call.get()
    if call is None:
        return _nothing
    call.run.request()
    if not call.gate.account.watched:
        call.times.end_wait()
        return _nothing
    loop = asyncio.get_running_loop()
    news = asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(news.set)

    with _admission(call, wake) as ticket:
        while True:
            news.clear()
            seconds = call.gate.poll(ticket)
            if seconds <= 0:
                return call.leave
            timer = None if seconds == INFINITE else loop.call_later(seconds, news.set)
            try:
                await news.wait()
            finally:
                if timer is not None:
                    timer.cancel()


def admit_in_thread() -> Callable[[], None]:
    """As `admit`, for a thread, which nothing can cancel: it waits for a free place until the run's deadline.

    On an event loop, where a request of LiteLLM's own would hold up everything else, it does nothing.
    """
    call = _call.get()
    if call is None:
        return _nothing
    call.run.request()
    if not call.gate.account.watched or _on_loop():
        call.times.end_wait()
        return _nothing
    news = threading.Event()
    with _admission(call, news.set) as ticket:
        while True:
            news.clear()
            seconds = call.gate.poll(ticket)
            if seconds <= 0:
                return call.leave
            if ticket.deadline is not None:
                left = ticket.deadline - time.monotonic()
                if left <= 0:
                    most = call.gate.limits.max_in_flight
                    raise Overloaded(f"the LM had no place for the next request: max_in_flight is {most}")
                seconds = min(seconds, left)
            news.wait(None if seconds == INFINITE else seconds)


@contextmanager
def _admission(call: _Call, wake: Callable[[], object]) -> Iterator[Ticket]:
    call.leave()
    ticket = Ticket(call.run.deadline, wake)
    call.leave = functools.partial(call.gate.leave, ticket)
    call.times.begin_wait()
    try:
        call.gate.enter(ticket)
        yield ticket
        call.times.end_wait()
    except BaseException as error:
        call.leave()
        call.run.not_sent()
        if isinstance(error, Overloaded):
            raise call.run.overloaded(str(error)) from None
        raise


def _on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def answered(status: int, header: Callable[[str], str | None]) -> Callable[[], None]:
    """Let all requests of the account wait for as long as a server that refuses one asks for.

    Returns what to call with each piece of the answer. Raises `LMOverloaded` if DSPy would wait past the deadline of
    this one.
    """
    call = _call.get()
    if call is None:
        return _nothing
    if status in _REFUSALS:
        _refused(call, header("retry-after"))
    return call.times.chunk if (header("content-type") or "").startswith("text/event-stream") else _nothing


def _refused(call: _Call, retry_after: str | None) -> None:
    # Until the next attempt, for which DSPy waits.
    call.times.begin_wait()
    if (seconds := _seconds(retry_after)) is None:
        return
    call.gate.account.pause(seconds)
    asked, deadline = asking.current.get(), call.run.deadline
    if asked is not None and asked.retries and deadline is not None:
        left = deadline - time.monotonic()
        if seconds > left:
            text = f"the LM's server refused a request for {seconds:.1f} s; {max(0.0, left):.1f} s are left"
            raise call.run.overloaded(text)


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header: a number, or a date."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if 0 < seconds < INFINITE else None


class TokenCount:
    """What DSPy reports the tokens of an answer to, in front of its usual tracker, or None."""

    def __init__(self, gate: Gate, tracker: Any) -> None:
        self._gate = gate
        self._tracker = tracker

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        """As of DSPy's `UsageTracker`."""
        self._gate.spend(tokens(usage_entry))
        if self._tracker is not None:
            self._tracker.add_usage(lm, usage_entry)


def tokens(usage: dict[str, Any]) -> int:
    total = usage.get("total_tokens")
    if isinstance(total, int):
        return total
    names = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")
    return sum(count for name in names if isinstance(count := usage.get(name), int))
