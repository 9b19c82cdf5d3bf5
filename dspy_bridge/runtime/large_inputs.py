"""Executes with large inputs, off the event loop. No DSPy here.

There they would make all other calls and deadlines late: writing an image of 50 MB into a prompt and a request takes
seconds, and a file may lie on a disk that answers late. So files are read and large inputs checked in threads of this
module; DSPy's module then runs in a worker thread, and its LM is asked on a second event loop.
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

# Characters, about: with what has most of anything, the event loop is held for some 70 ms.
LARGE = 1 << 20
# Of one input of a batch: between two steps of another execute there may be several of those.
LARGE_IN_BATCH = LARGE // 4
# What else costs as much as how many characters, to check it and to write it into a prompt.
_VALUE, _CONTAINER, _MESSAGE = 10, 100, 1000
# So many bytes of a request hold nothing large, whatever they are: an empty message has three.
NEVER_LARGE = LARGE_IN_BATCH // 512
# A disk that does not answer can take them all: then only executes with files or large inputs wait.
_READERS = 8

# Whether the execute that this context belongs to is large.
here: ContextVar[bool] = ContextVar("large", default=False)


def is_large(values: Any, limit: int = LARGE) -> bool:
    """Whether there are `limit` characters in it, or values that cost as much; media count with their content."""
    left, inside = limit, [values]
    while inside:
        value = inside.pop()
        more: Any = ()
        if isinstance(value, (str, bytes)):
            left -= len(value)
        elif isinstance(value, dict):
            # A history's, before and after it is checked.
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
    """Run `work`, which reads files or looks at large inputs. Cancelling leaves it to its end."""
    return await asyncio.get_running_loop().run_in_executor(_readers(), work)


@functools.cache
def _readers() -> DaemonThreads:
    return DaemonThreads(_READERS, "dspy_bridge-reader")


_loop: asyncio.AbstractEventLoop | None = None
_starting = threading.Lock()


def loop() -> asyncio.AbstractEventLoop:
    """The second event loop, which runs from now on."""
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
            continue  # out of a task, which keeps it for its waiter
