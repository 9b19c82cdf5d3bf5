"""The event loop on which runs begin. What LM calls share, the limits of their accounts first of all, is used there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_main: asyncio.AbstractEventLoop | None = None


def begin() -> None:
    """Called on it by each run."""
    global _main
    _main = asyncio.get_running_loop()


def get() -> asyncio.AbstractEventLoop | None:
    """The loop; None before the first run."""
    return None if _main is None or _main.is_closed() else _main


async def run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` there, from any loop."""
    loop = get()
    if loop in (None, asyncio.get_running_loop()):
        return await work
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


def call(work: Callable[..., object], *args: Any) -> None:
    """Call `work` there: at once if this is that loop, else soon. From any thread."""
    loop = get()
    try:
        here = loop in (None, asyncio.get_running_loop())
    except RuntimeError:  # in a thread
        here = False
    if here:
        work(*args)
    elif loop is not None:
        loop.call_soon_threadsafe(work, *args)
