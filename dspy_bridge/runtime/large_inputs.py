"""Keeps runs with large inputs off the event loop, where they would delay all other calls and deadlines.

Formatting an image of 50 MB into a prompt takes seconds, and a file may be on a slow disk. So files are read and large
inputs checked in threads of this module; then DSPy's module runs in a worker thread, and its LM is called on a second
event loop. Does not import DSPy.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from contextvars import ContextVar
from typing import Any, TypeVar

from dspy_bridge.runtime import inline_executor
from dspy_bridge.runtime.daemon_threads import DaemonThreads
from dspy_bridge.runtime.event_loop import EventLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# In characters, roughly: at worst the event loop is blocked for some 70 ms.
LARGE = 1 << 20
# For an input of a batch, as several of these may run between two steps of another run.
LARGE_IN_BATCH = LARGE // 4
# The cost of other things, in characters: of checking them and formatting them into a prompt.
_VALUE, _CONTAINER, _MESSAGE = 10, 100, 1000
# A request of fewer bytes is never large, whatever it holds: even an empty message takes three bytes.
NEVER_LARGE = LARGE_IN_BATCH // 512
# A disk that hangs can block all of them: then only runs with files or large inputs wait.
_READERS = 8

# Whether the run of this context has large inputs.
here: ContextVar[bool] = ContextVar("large", default=False)


def is_large(values: Any, limit: int = LARGE) -> bool:
    """Whether the values cost as much as `limit` characters. Media count with their content."""
    left, inside = limit, [values]
    while inside:
        value = inside.pop()
        more: Any = ()
        if isinstance(value, (str, bytes)):
            left -= len(value)
        elif isinstance(value, dict):
            # Those of a history, before and after validation.
            messages = value.get("messages")
            left -= _CONTAINER + (_MESSAGE * len(messages) if isinstance(messages, list) else 0)
            more = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            left -= _CONTAINER
            more = value
        elif hasattr(value, "__dict__"):
            more = (vars(value),)
        left -= _VALUE * len(more)
        if left <= 0:
            return True
        inside.extend(more)
    return False


async def in_thread(work: Callable[[], T]) -> T:
    """Run `work`, which reads files or checks large inputs, in a thread. Cancelling does not stop it."""
    return await asyncio.get_running_loop().run_in_executor(_readers(), work)


@functools.cache
def _readers() -> DaemonThreads:
    return DaemonThreads(_READERS, "dspy_bridge-reader")


_loop: asyncio.AbstractEventLoop | None = None
_starting = threading.Lock()


def loop() -> asyncio.AbstractEventLoop:
    """The second event loop; starts it if needed."""
    global _loop
    with _starting:
        if _loop is None:
            _loop = EventLoop()
            _loop.set_default_executor(inline_executor.InlineExecutor(memory_cache_only=False))
            threading.Thread(target=_run, args=(_loop,), name="dspy_bridge-large", daemon=True).start()
        return _loop


def loops() -> list[asyncio.AbstractEventLoop]:
    """The second event loop, if it runs."""
    return [] if _loop is None else [_loop]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            continue  # raised by a task, which keeps it for its waiter
