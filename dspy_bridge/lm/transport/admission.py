"""Requests of LM calls wait for the limits of their account. Imports DSPy.

Each attempt to ask an LM passes `admitted`, those of DSPy's retries too; what the cache answers does not.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

from dspy_bridge.errors import Overloaded
from dspy_bridge.lm import lm_call, main_loop
from dspy_bridge.lm.lm_call import LMCall, Target
from dspy_bridge.lm.rate_limits import INFINITE, Gate, Ticket

# The statuses by which a server refuses a request that it may take later.
REFUSALS = (429, 503)


@asynccontextmanager
async def admitted() -> AsyncIterator[None]:
    """Around a request of the call under way: it begins once that may be sent, and ends with the answer.

    Raises `LMOverloaded`.
    """
    call = lm_call.current.get()
    if call is None or call.target is None:
        yield
        return
    call.run.request()
    ticket, gate = None, call.target.lane.gate
    if gate.watched:
        gone: Future[None] = Future()
        ticket = Ticket(call.target.lane, call.run.deadline, functools.partial(_settle, gone))
        call.begin_wait()
        main_loop.call(_change, gate, gate.enter, ticket)
        try:
            await asyncio.wrap_future(gone)
        except BaseException as error:
            # Cancelled on another loop it may have its place by now.
            main_loop.call(_change, gate, gate.leave, ticket)
            call.run.not_sent()
            if isinstance(error, Overloaded):
                raise call.run.overloaded(str(error)) from None
            raise
    call.end_wait()
    call.first_chunk = None
    try:
        yield
    finally:
        if ticket is not None:
            main_loop.call(_change, gate, gate.leave, ticket)


def _settle(gone: Future[None], refusal: Overloaded | None) -> None:
    if gone.set_running_or_notify_cancel():
        gone.set_result(None) if refusal is None else gone.set_exception(refusal)


def _change(gate: Gate, change: Callable[..., None], *args: Any) -> None:
    change(*args)
    _advance(gate)


# The timers of gates where requests wait.
_timers: dict[Gate, asyncio.TimerHandle] = {}


def _advance(gate: Gate) -> None:
    if (timer := _timers.pop(gate, None)) is not None:
        timer.cancel()
    seconds = gate.advance()
    if seconds != INFINITE:
        # Its context must not keep the run that happened to start the timer.
        later = asyncio.get_running_loop().call_later
        _timers[gate] = later(seconds, functools.partial(_advance, gate), context=contextvars.Context())


def refused(call: LMCall, target: Target, retry_after: str | None) -> None:
    """A server has refused a request: let all of the account wait for as long as it asks for.

    Raises `LMOverloaded` if DSPy would wait past the deadline of this one.
    """
    # Until the next attempt, for which DSPy waits.
    call.begin_wait()
    if (seconds := _seconds(retry_after)) is None:
        return
    main_loop.call(_change, target.lane.gate, target.lane.gate.pause, seconds)
    if target.retries and call.run.deadline is not None:
        left = call.run.deadline - time.monotonic()
        if seconds > left:
            text = f"the LM's server refused a request for {seconds:.1f} s; {max(0.0, left):.1f} s are left"
            raise call.run.overloaded(text)


def spend(target: Target, tokens: int) -> None:
    """Count the tokens of an answer. From any thread."""
    gate = target.lane.gate
    main_loop.call(_change, gate, gate.spend, tokens, target.lane)


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
