"""Imports LiteLLM, which takes seconds, in a thread before an async call needs it.

DSPy imports it in the middle of the first call that its own engine cannot serve: on the event loop, where every other
call and every deadline would wait for it.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import importlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from threading import Lock, Thread
from typing import Any

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.transport.litellm_answer_limit import watch_clients

_importing: Future[None] | None = None
_lock = Lock()


def after_import(call: Callable[..., Any]) -> Callable[..., Any]:
    """The coroutine function `call`, run once LiteLLM is imported."""

    @functools.wraps(call)
    async def wait_and_call(*args: Any, **kwargs: Any) -> Any:
        await _imported()
        return await call(*args, **kwargs)

    return wait_and_call


def streaming_after_import(stream: Callable[..., Any]) -> Callable[..., Any]:
    """The async generator function `stream`, run once LiteLLM is imported."""

    @functools.wraps(stream)
    async def wait_and_stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        await _imported()
        async with aclosing(stream(*args, **kwargs)) as events:
            async for event in events:
                yield event

    return wait_and_stream


async def _imported() -> None:
    """Return once LiteLLM is imported. Raises what its import raises; the next call tries again."""
    # Shielded: a cancelled waiter does not stop it for the others.
    await asyncio.shield(asyncio.wrap_future(start()))


def start() -> Future[None]:
    """Start the import, unless it is under way or done."""
    global _importing
    with _lock:
        if _importing is None or (_importing.done() and _importing.exception() is not None):
            _importing = Future()
            Thread(target=_import, args=(_importing,), name="dspy_bridge-litellm", daemon=True).start()
        return _importing


def _import(done: Future[None]) -> None:
    try:
        if dspy_internals.GET_LITELLM.there:
            # DSPy's own threads may be importing it: 3.4.0 holds a lock meanwhile, and the module counts as imported.
            dspy_internals.GET_LITELLM.value(feature="dspy.LM")
        else:
            importlib.import_module("litellm")
        watch_clients()
        # It runs before LiteLLM's own exit handlers, which were registered before.
        atexit.register(dspy_internals.silence_litellm)
        done.set_result(None)
    except BaseException as error:  # many packages' code, which may raise anything
        done.set_exception(error)
