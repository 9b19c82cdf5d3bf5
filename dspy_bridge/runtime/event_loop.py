"""An asyncio event loop that runs short steps inline, keeps no contexts of runs, and notices that code blocks it.

DSPy sends parts of each LM call (preparation, cache look-up, routing, pricing) through `asyncio.to_thread`: five
thread switches of some 100 µs each, more while other threads are busy, for steps of some 10 µs. Inline a run takes 5 %
less CPU with 64 in flight, a step of an agent 16 % less.

A step runs inline if `allow` names it and it has run in a thread before, for the same model: the first one may import a
provider's library.

asyncio keeps for each callback the context in which it was registered. A connection to a provider stays open, and its
context would keep all that the context variables refer to: DSPy's settings, its LMs, the arguments of the run. 20 runs
with 8 MB each left 300 MB.

While code blocks the loop no run makes progress and no deadline passes. Its selector notes when it returns and when it
is called again: between the two the loop is in one turn. A thread looks at these notes, and if the loop is in a turn at
the frames of its thread: for how long does one step last? Only the time between two timely looks counts. If the thread
was late itself, the whole process did not run: it was stopped, the machine was busy, or C code held the interpreter.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType, FunctionType, MethodType
from typing import Any

from dspy_bridge import logs
from dspy_bridge.errors import BridgeError
from dspy_bridge.runtime.daemon_threads import DaemonThreads

_steps: frozenset[FunctionType] = frozenset()
# The most kinds of steps that are remembered, as a client may use any number of model names.
_MOST = 1000

# Between two looks, in seconds.
_TICK = 0.05
# A step that was seen for so long is logged. It may have begun one look before, so those of 250 ms are.
SLOW = 0.25 - _TICK
# After so many seconds in one step pings fail.
BLOCKED = 5.0
# The flags of coroutines, of generators used as such and of async generators; `inspect` takes 10 ms to import.
_COROUTINE = 0x80 | 0x100 | 0x200
# The file of frames that import a module, or wait until another thread has imported it.
_IMPORTING = "<frozen importlib."


def allow(steps: Iterable[FunctionType]) -> None:
    """The functions that may run inline, each with an LM or a request as its first argument."""
    global _steps
    _steps = frozenset(steps)


class WatchedSelector(selectors.DefaultSelector):
    """A selector that notes when its loop turns."""

    def __init__(self) -> None:
        super().__init__()
        # When the present turn began, by `time.monotonic`; None while the loop waits.
        self.turn_began: float | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.turn_began = None
        ready = super().select(timeout)
        self.turn_began = time.monotonic()
        return ready


class EventLoop(asyncio.SelectorEventLoop):
    """Callbacks of descriptors get an empty context, as transports need none."""

    def __init__(self, threads: str = "dspy_bridge-hop", inline: bool = True) -> None:
        """`threads`: the name of those of the default executor. `inline`: whether short steps run inline."""
        self._notes = WatchedSelector()
        super().__init__(self._notes)
        # By what the loop is blocked; any thread may read it.
        self.blocked: str | None = None
        # More than Python's default of six, as user code may block some.
        self.set_default_executor(DaemonThreads(64, threads))
        self._inline = inline
        # The kinds of steps that have run in a thread.
        self._ran: set[Any] = set()

    def run_on_thread(self, watched: bool = False) -> None:
        """Run for ever, on a daemon thread. `watched`: set `blocked`, and log what blocks this thread."""
        if watched:
            thread = threading.get_ident()
            threading.Thread(target=self._watch, args=(thread,), name="dspy_bridge-watch", daemon=True).start()
        while True:
            try:
                self.run_forever()
            except (SystemExit, KeyboardInterrupt):
                continue  # asyncio lets these two out of a task, which keeps them for its waiter

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]  # any callable
        """As asyncio's; the future may be done already."""
        kind = _kind(func) if executor is None and self._inline and not args else None
        if kind in self._ran:
            future = self.create_future()
            try:
                future.set_result(func())
            except BaseException as error:
                future.set_exception(error)
            return future
        future = super().run_in_executor(executor, func, *args)
        if kind is not None:
            if len(self._ran) >= _MOST:
                self._ran.clear()
            future.add_done_callback(lambda done: self._ran.update(() if done.cancelled() else (kind,)))
        return future

    def _watch(self, thread: int) -> None:
        seen: tuple[float, FrameType] | None = None
        place, held = "", 0.0
        while True:
            before = time.monotonic()
            time.sleep(_TICK)
            turn, last = self._notes.turn_began, seen
            step = None if turn is None else _step(thread)
            seen = None if turn is None or step is None else (turn, step[0])
            if step is not None and last is not None and seen == last:
                place = step[1]
                held += min(time.monotonic() - before, 2 * _TICK)
                if held >= BLOCKED:
                    text = f"the event loop has been blocked for {held:.0f} s by {place}"
                    if self.blocked is None:
                        logs.warn(f"{text}: nothing else runs, no deadline passes, and pings fail")
                    self.blocked = text
            else:
                if held >= SLOW:
                    logs.warn(f"{place} blocked the event loop for {held:.1f} s")
                self.blocked, held = None, 0.0

    # Private methods of asyncio. If they are gone, these are never called.

    def _add_reader(self, *args: Any) -> Any:
        return contextvars.Context().run(super()._add_reader, *args)  # type: ignore[misc]

    def _add_writer(self, *args: Any) -> Any:
        return contextvars.Context().run(super()._add_writer, *args)  # type: ignore[misc]


def _kind(fn: Callable[..., Any]) -> Any:
    """The key of a listed step, which `asyncio.to_thread` sends as `partial(context.run, step, lm, …)`; or None."""
    parts: tuple[Any, ...] = getattr(fn, "args", ())
    if len(parts) < 2:
        return None
    step: Any = parts[0]
    of = getattr(parts[1], "model", None)
    if isinstance(step, MethodType):
        # Each of its objects may begin with something long.
        step, of = step.__func__, id(step.__self__)
    # Other objects may not be hashable.
    return (step, of) if isinstance(step, FunctionType) and step in _steps else None


def refuse_sync_call() -> None:
    """Raise for a sync call of an LM in a coroutine on one of these loops: all other runs would wait for its answer."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    if isinstance(loop, EventLoop):
        raise BridgeError(
            "a module called an LM synchronously in its aforward, which would block all other runs: "
            "instead of self.predict(…) write await self.predict.acall(…)"
        )


def _step(thread: int) -> tuple[FrameType, str] | None:
    """The frame of a thread's outermost coroutine, and the place of its innermost one; None during an import."""
    frame = first = sys._current_frames().get(thread)
    coroutines: list[FrameType] = []
    while frame is not None:
        if frame.f_code.co_flags & _COROUTINE:
            coroutines.append(frame)
        elif not coroutines and frame.f_code.co_filename.startswith(_IMPORTING):
            return None
        frame = frame.f_back
    innermost = coroutines[0] if coroutines else first
    if innermost is None:
        return None
    code = innermost.f_code
    # Before Python 3.11 code has no qualified name.
    name = getattr(code, "co_qualname", code.co_name)
    place = f"{innermost.f_globals.get('__name__')}.{name}, line {innermost.f_lineno}"
    return coroutines[-1] if coroutines else innermost, place
