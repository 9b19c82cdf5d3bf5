"""LiteLLM, which takes seconds to import, is imported in a thread before an async call needs it. Imports DSPy.

DSPy decides with each call whether its own engine can serve it, and imports LiteLLM in the middle of the first call for
which it cannot: on the event loop, where every other call and every deadline would wait for it. All such calls go
through DSPy's engine for LiteLLM, whose methods wait for the thread here.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from threading import Thread
from typing import Any

from dspy.clients.engines import AsyncLiteLLMEngine

_importing: Future[None] | None = None


@functools.cache
def install() -> None:
    """Does it; once in a process. All of it or nothing: raises `AttributeError` first."""
    engine: Any = AsyncLiteLLMEngine
    complete, complete_legacy, stream = engine.complete, engine.complete_legacy, engine.stream
    engine.complete, engine.complete_legacy, engine.stream = _after(complete), _after(complete_legacy), _behind(stream)


def _after(complete: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(complete)
    async def call(*args: Any, **kwargs: Any) -> Any:
        await _imported()
        return await complete(*args, **kwargs)

    return call


def _behind(stream: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stream)
    async def events(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        await _imported()
        async with aclosing(stream(*args, **kwargs)) as given:
            async for event in given:
                yield event

    return events


async def _imported() -> None:
    """Return once LiteLLM is there. Raises what its import raises; the next call tries again."""
    global _importing
    if _importing is None or (_importing.done() and _importing.exception() is not None):
        _importing = Future()
        Thread(target=_import, args=(_importing,), name="dspy_bridge-litellm", daemon=True).start()
    # Shielded: a waiter that is cancelled does not stop it for the others.
    await asyncio.shield(asyncio.wrap_future(_importing))


def _import(done: Future[None]) -> None:
    try:
        importlib.import_module("litellm")
        done.set_result(None)
    except BaseException as error:  # a package of many others' code, which may raise anything
        done.set_exception(error)
