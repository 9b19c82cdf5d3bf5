"""Makes LMs of complete options."""

from __future__ import annotations

import asyncio
import copy
import weakref
from contextlib import suppress
from typing import Any

import dspy

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.lm import dspy_internals, lm_options, main_loop, rate_limits
from dspy_bridge.lm.event_loop_lm import LoopLM
from dspy_bridge.lm.lm_call import Target
from dspy_bridge.lm.offline import echo_lm, offline_lm, script_lm
from dspy_bridge.lm.transport import litellm_route, routes
from dspy_bridge.logs import redaction
from dspy_bridge.runtime import large_inputs


class _Connections:
    """Those of an LM and of its copies. They are closed when nothing refers to it any more: else they stay open for as
    long as the provider likes, even those of an LM that is garbage."""


def make(options: dict[str, Any]) -> dspy.BaseLM:
    """`options`: complete, as of `lm_options`. Raises `InvalidArgs` or `LMNotConfigured`."""
    model, of_dspy, scope, connect_timeout, limits, supports, key_of = lm_options.split(options, "lm")
    if "answers" in of_dspy and model != script_lm.NAME:
        raise InvalidArgs(f"lm.answers: only for {script_lm.NAME}")
    try:
        if model == echo_lm.NAME:
            lm = offline_lm.OfflineLM(model, echo_lm.answer, **of_dspy)
        elif model == script_lm.NAME:
            lm = offline_lm.OfflineLM(model, script_lm.Script(of_dspy.pop("answers", None)).answer, **of_dspy)
        else:
            lm = LoopLM(model, **of_dspy)
            routes.refuse_litellm(lm, {}, "lm")
    except (TypeError, ValueError, dspy.LMError) as error:
        raise InvalidArgs(f"lm: {error}") from None
    lm.supports = supports
    lane = rate_limits.lane(routes.limited_account(options), limits)
    lm.target = Target(routes.account(options), scope, connect_timeout, lm.num_retries > 0, key_of, lane)
    lm.secrets = list(redaction.secrets(options))
    redaction.remember(lm.secrets)
    # A copy shares the connections; it must not keep what its end depends on.
    closing = copy.copy(lm)
    lm.connections = _Connections()
    weakref.finalize(lm.connections, _close, closing).atexit = False
    return lm


def warm_up(lm: dspy.BaseLM) -> None:
    """Import LiteLLM in a thread, if the LM needs it: its first call would wait for that."""
    if not dspy_internals.SELECT_BACKEND.there or isinstance(lm, offline_lm.OfflineLM):
        return
    with suppress(Exception):  # of wrong options, which the call reports
        if not dspy_internals.SELECT_BACKEND.value(lm).native:
            litellm_route.start()


def _close(lm: Any) -> None:
    """Called on any thread."""
    for loop in (main_loop.get(), *large_inputs.loops()):
        if loop is not None and not loop.is_closed():
            asyncio.run_coroutine_threadsafe(lm.aclose(), loop)
