"""Pools of LMs: as many with equal options as the calls in flight need, since each has only so many connections."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import dspy

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.lm import dspy_internals, lm_options, main_loop, rate_limits, servers
from dspy_bridge.lm.event_loop_lm import LoopLM
from dspy_bridge.lm.lm_call import Target
from dspy_bridge.lm.offline import echo_lm, offline_lm, script_lm
from dspy_bridge.lm.transport import litellm_route
from dspy_bridge.logs import redaction
from dspy_bridge.runtime import large_inputs

# The connections that one dspy.LM opens at most. A call past them would wait for another's end, so it gets another LM
# with the same options: 512 calls of 1 s ran at 85/s with one LM and at 235/s with six.
CALLS_PER_LM = 100


class LMPool:
    """LMs with equal options, checked out and in on the event loop.

    When nothing refers to it any more its connections are closed: else they stay open for as long as the provider
    likes, even those of an LM that is garbage.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        """`options`: complete, as of `lm_options`. Raises `InvalidArgs`."""
        # Its LMs share one script.
        self._options = options = script_lm.with_script(options)
        self._secrets = list(redaction.secrets(options))
        redaction.remember(self._secrets)
        self._lms = [_make_lm(options)]
        self._in_flight = [0]
        self._finalizer = weakref.finalize(self, _close, self._lms)
        self._finalizer.atexit = False

    def own(self) -> dspy.BaseLM:
        """An LM with the same options and connections of its own, until `close_own`."""
        pool = LMPool(self._options)
        lm = pool.lasting()
        lm.close_own = pool._finalizer
        return lm

    def lasting(self) -> dspy.BaseLM:
        """An LM to keep: it keeps the pool."""
        # A copy shares the connections. The LMs themselves must not lead to the pool: its finalizer has them.
        lm = copy.copy(self._lms[0])
        lm.pool = self
        return lm

    def warm_up(self) -> None:
        """Import LiteLLM in a thread, if these LMs need it: their first call would wait for that."""
        if not dspy_internals.SELECT_BACKEND.there or isinstance(self._lms[0], offline_lm.OfflineLM):
            return
        with suppress(Exception):  # of wrong options, which the call reports
            if not dspy_internals.SELECT_BACKEND.value(self._lms[0]).native:
                litellm_route.start()

    @contextmanager
    def checkout(self) -> Iterator[dspy.BaseLM]:
        """An LM with a free connection."""
        redaction.remember(self._secrets)
        place = next((n for n, count in enumerate(self._in_flight) if count < CALLS_PER_LM), len(self._lms))
        if place == len(self._lms):
            self._lms.append(_make_lm(self._options))
            self._in_flight.append(0)
        self._in_flight[place] += 1
        try:
            yield self._lms[place]
        finally:
            self._in_flight[place] -= 1


def close_own(lms: list[dspy.BaseLM]) -> None:
    """Close the connections of LMs of `own`, which nobody calls any more, whatever else still refers to them.

    Those of other LMs stay open.
    """
    for lm in lms:
        close = getattr(lm, "close_own", None)
        if close is not None:
            close()


# A loop keeps no reference to its tasks.
_closing: set[asyncio.Task[None]] = set()


def _close(lms: list[Any]) -> None:
    """Called on any thread."""

    async def close() -> None:
        for lm in lms:
            with suppress(Exception):  # connections that were broken already
                await lm.aclose()

    def start() -> None:
        task = asyncio.get_running_loop().create_task(close())
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    for loop in (main_loop.get(), *large_inputs.loops()):
        with suppress(RuntimeError):  # the loop is closed
            if loop is not None:
                loop.call_soon_threadsafe(start, context=contextvars.Context())


def _make_lm(options: dict[str, Any]) -> dspy.BaseLM:
    model, of_dspy, scope, connect_timeout, limits, supports, key_of = lm_options.split(options, "lm")
    try:
        if model == echo_lm.NAME:
            lm = offline_lm.OfflineLM(model, echo_lm.answer, **of_dspy)
        elif model == script_lm.NAME:
            lm = offline_lm.OfflineLM(model, of_dspy.pop("answers").answer, **of_dspy)
        else:
            lm = LoopLM(model, **of_dspy)
    except (TypeError, ValueError, dspy.LMError) as error:
        raise InvalidArgs(f"lm: {error}") from None
    lm.supports = supports
    lane = rate_limits.lane(servers.limited_account(options), limits)
    lm.target = Target(servers.account(options), scope, connect_timeout, lm.num_retries > 0, key_of, lane)
    return lm
