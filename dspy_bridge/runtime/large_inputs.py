"""Keeps runs with large inputs off the event loop, where they would delay all other calls and deadlines.

Formatting an image of 50 MB into a prompt takes seconds, and a file may be on a slow disk. So files are read and large
inputs checked in threads of this module; then DSPy's module runs in a worker thread, and its LM is called on a second
event loop. Does not import DSPy.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from dspy_bridge.runtime.daemon_threads import DaemonThreads
from dspy_bridge.runtime.event_loop import EventLoop

T = TypeVar("T")

# In bytes of the request, for each of its inputs. The densest smaller input, small objects alone, blocks the event loop
# for some 0.2 s.
LARGE = 1 << 18
# A disk that hangs can block all of them: then only runs with files or large inputs wait.
_readers = DaemonThreads(8, "dspy_bridge-reader")

# Whether the run of this context has large inputs.
here: ContextVar[bool] = ContextVar("large", default=False)


def are_large(size: int, inputs: dict[str, Any] | list[Any]) -> bool:
    """Whether the inputs of a request of `size` bytes are large, on average."""
    return size >= LARGE * (len(inputs) if isinstance(inputs, list) else 1)


def names_file(value: Any) -> bool:
    """Whether an input may name a file."""
    if isinstance(value, dict):
        return "path" in value or any(map(names_file, value.values()))
    return isinstance(value, list) and any(map(names_file, value))


async def in_thread(work: Callable[[], T]) -> T:
    """Run `work`, which reads files or checks large inputs, in a thread. Cancelling does not stop it."""
    return await asyncio.get_running_loop().run_in_executor(_readers, work)


# Between two collections, in seconds; one takes some 10 ms.
_SECONDS_BETWEEN = 0.25
_collected = 0.0


def collect() -> None:
    """After a run: DSPy leaves large inputs in reference cycles. 30 runs with 8 MB each left 460 MB."""
    global _collected
    if here.get() and time.monotonic() - _collected > _SECONDS_BETWEEN:
        gc.collect()
        _collected = time.monotonic()


_loop: EventLoop | None = None
_starting = threading.Lock()


def loop() -> asyncio.AbstractEventLoop:
    """The second event loop; starts it if needed."""
    global _loop
    with _starting:
        if _loop is None:
            # Steps with large values are not short.
            _loop = EventLoop("dspy_bridge-large-hop", inline=False)
            threading.Thread(target=_loop.run_on_thread, name="dspy_bridge-large", daemon=True).start()
        return _loop


def loops() -> list[asyncio.AbstractEventLoop]:
    """The second event loop, if it runs."""
    return [] if _loop is None else [_loop]
