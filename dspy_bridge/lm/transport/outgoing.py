"""What happens to each request that DSPy's own engine sends to an LM. Imports DSPy.

In this order: it waits for the limits of its account and counts for the budget of its run, gets the run's
`traceparent`, connects within the `connect_timeout`, and of the answer a redirect is refused and the bytes are counted.
So does each attempt of DSPy's retries; what the cache answers does not come here.

DSPy has no place for a header of one call: an LM's options are part of the cache's key, so the cache would never hit,
and a header among them makes DSPy call LiteLLM in place of its own engine. So the transports of its engine are wrapped;
for LiteLLM see `litellm_route`.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import dspy

from dspy_bridge import tracing
from dspy_bridge.errors import Overloaded
from dspy_bridge.lm import dspy_internals, lm_call
from dspy_bridge.lm.lm_call import LMCall, Target
from dspy_bridge.lm.rate_limits import INFINITE, Lane

# Bytes of each answer; set once, from the settings.
most = 32 * 1024 * 1024
# Of an LM to its server: `max_in_flight` bounds them. By default there are 100, and further calls wait.
_CONNECTIONS = 100_000
# Between attempts to connect, in seconds. Each further delay is twice as long.
_FIRST_DELAY = 0.1
# A transport may take a timeout of 0 for none.
_SHORTEST = 0.001
# What DSPy's transports and LiteLLM's clients raise if there is no connection.
_NO_CONNECTION = ("ConnectError", "ConnectTimeout")
# The statuses by which a server refuses a request that it may take later.
_REFUSALS = (429, 503)
T = TypeVar("T")


class LMAnswerRefused(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """An answer is too long, or a redirect. Not worth a retry."""


class LMUnreachable(dspy.LMError):  # type: ignore[misc]
    """No connection to the LM's server. DSPy does not try again."""


@asynccontextmanager
async def admitted(tokens: int = 0) -> AsyncIterator[None]:
    """Around a request of the call under way: it begins once that may be sent, and ends with the answer.

    `tokens`: an estimate of what it takes. Raises `LMOverloaded`.
    """
    run, sent = lm_call.run(), False
    await run.begin_request(tokens)
    try:
        async with _place():
            sent = True
            yield
    finally:
        run.end_request(sent=sent)


@asynccontextmanager
async def _place() -> AsyncIterator[None]:
    call = lm_call.current.get()
    if call is None or call.target is None:
        yield
        return
    request: Future[None] | None = None
    lane = call.target.lane
    if lane.watched:
        request = Future()
        call.begin_wait()
        _change(lane, lane.enter, request, call.run.deadline)
        try:
            await asyncio.wrap_future(request)
        except BaseException as error:
            # Cancelled on another loop it may have its place by now.
            _change(lane, lane.leave, request)
            if isinstance(error, Overloaded):
                raise call.run.overloaded(str(error)) from None
            raise
    call.end_wait()
    call.first_chunk = None
    try:
        yield
    finally:
        if request is not None:
            _change(lane, lane.leave, request)


def spend(target: Target, tokens: int) -> None:
    """Count the tokens of an answer. From any thread."""
    if target.lane.watched:
        _change(target.lane, target.lane.spend, tokens)


# The timers of lanes where requests wait.
_timers: dict[Lane, asyncio.TimerHandle] = {}


def _change(lane: Lane, change: Callable[..., None], *args: Any) -> None:
    def changed() -> None:
        change(*args)
        _advance(lane)

    lm_call.call_on_main_loop(changed)


def _advance(lane: Lane) -> None:
    if (timer := _timers.pop(lane, None)) is not None:
        timer.cancel()
    seconds = lane.advance()
    if seconds != INFINITE:
        # Its context must not keep the run that happened to start the timer.
        later = asyncio.get_running_loop().call_later
        _timers[lane] = later(seconds, functools.partial(_advance, lane), context=contextvars.Context())


def _refused(call: LMCall, target: Target, retry_after: str) -> None:
    """A server has refused a request: let all of its lane wait for as long as it asks for.

    Raises `LMOverloaded` if DSPy would wait past the deadline of this one.
    """
    # Until the next attempt, for which DSPy waits.
    call.begin_wait()
    try:
        seconds = float(retry_after)
    except ValueError:  # none, or a date, which no server of an LM sends
        return
    if not 0 < seconds < INFINITE:
        return
    _change(target.lane, target.lane.pause, seconds)
    if target.retries and call.run.deadline is not None:
        left = call.run.deadline - time.monotonic()
        if seconds > left:
            text = f"the LM's server refused a request for {seconds:.1f} s; {max(0.0, left):.1f} s are left"
            raise call.run.overloaded(text)


def check(status: int, header: Callable[[str], str | None], *, private: bool = True) -> None:
    """The head of an answer: lets the account wait if its server asks for it. Raises `LMAnswerRefused` for a redirect.

    `private`: a redirect would take a prompt or a key to another server.
    """
    call = lm_call.current.get()
    if call is not None and call.target is not None and status in _REFUSALS:
        _refused(call, call.target, header("retry-after") or "")
    if private and 300 <= status < 400:
        to = urlsplit(header("location") or "").hostname or "another path"
        raise LMAnswerRefused(f"the server answers with a redirect ({status}) to {to}; no redirect is followed")


async def connect(attempt: Callable[[float | None], Awaitable[T]], target: Target | None, url: str) -> T:
    """What `attempt(seconds)` returns, which may take so long to connect. Raises `LMUnreachable` with host and port.

    `target`: None for an LM that your application made, which has its own timeouts. A server that is just being started
    may refuse at first, so attempts that fail at once are repeated, within the target's `connect_timeout`; DSPy would
    try for 7 to 13 s.
    """
    if target is None:
        return await attempt(None)
    end, delay = time.monotonic() + target.connect_timeout, _FIRST_DELAY
    while True:
        try:
            return await attempt(max(end - time.monotonic(), _SHORTEST))
        except Exception as error:
            if type(error).__name__ not in _NO_CONNECTION:
                raise
            if not target.retries or time.monotonic() + delay >= end:
                parts = urlsplit(url)
                port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
                within = f"within {target.connect_timeout:g} s"
                raise LMUnreachable(f"{parts.hostname}:{port} cannot be reached {within}: {error}") from error
        await asyncio.sleep(delay)
        delay *= 2


@dspy_internals.CONNECTIONS.replace
def _transport_options(config: Any) -> dict[str, Any]:
    return {"max_connections": _CONNECTIONS, **dspy_internals.CONNECTIONS.value(config)}


@dspy_internals.TRANSPORT.replace
@asynccontextmanager
async def _send(transport: Any, request: Any) -> AsyncIterator[Any]:
    if (traceparent := tracing.current()) is not None:
        # The only one: an LM with headers of its own goes through LiteLLM.
        request = dataclasses.replace(request, headers=[*request.headers, (tracing.TRACEPARENT, traceparent)])
    async with admitted(len(request.body or b"") // 4), AsyncExitStack() as stack:

        async def attempt(seconds: float | None) -> Any:
            timed = dataclasses.replace(request, connect_timeout=seconds)
            return await stack.enter_async_context(dspy_internals.TRANSPORT.value(transport, timed))

        response = await connect(attempt, lm_call.target(), request.url)
        check(response.status, response.header)
        streamed = (response.header("content-type") or "").startswith("text/event-stream")
        call = lm_call.current.get() if streamed else None

        async def chunks() -> AsyncIterator[bytes]:
            left = most
            async with aclosing(aiter(response)) as pieces:
                async for piece in pieces:
                    if call is not None:
                        call.chunk()
                    left -= len(piece)
                    if left < 0:
                        text = f"the answer is longer than DSPY_BRIDGE_MAX_LM_BYTES allows: {most} bytes"
                        raise LMAnswerRefused(text)
                    yield piece

        yield type(response)(
            status=response.status,
            reason=response.reason,
            headers=response.headers,
            http_version=response.http_version,
            chunks=chunks(),
            release=lambda _consumed: response.aclose(),
        )
