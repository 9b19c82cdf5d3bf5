"""Notices that code blocks the event loop. While it does, no run makes progress and no deadline passes.

The loop's selector notes when it returns and when it is called again: between the two the loop is in one turn. A thread
looks at these notes, and if the loop is in a turn at the frames of its thread: for how long does one step last?

Only the time between two timely looks counts. If the thread was late itself, the whole process did not run: it was
stopped, the machine was busy, or C code held the interpreter.
"""

from __future__ import annotations

import sys
import threading
import time

from dspy_bridge import logs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

    from dspy_bridge.runtime.event_loop import WatchedSelector

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


class LoopWatch:
    """Watches one event loop. `blocked` says by what it is blocked, or is None; any thread may read it."""

    def __init__(self) -> None:
        self.blocked: str | None = None

    def start(self, selector: WatchedSelector) -> None:
        """Watch the loop of this selector, which the calling thread is going to run."""
        arguments = (selector, threading.get_ident())
        threading.Thread(target=self._watch, args=arguments, name="dspy_bridge-watch", daemon=True).start()

    def _watch(self, selector: WatchedSelector, thread: int) -> None:
        seen: tuple[float, FrameType] | None = None
        place, held = "", 0.0
        while True:
            before = time.monotonic()
            time.sleep(_TICK)
            turn, last = selector.turn_began, seen
            step = None if turn is None else _step(thread)
            seen = None if turn is None or step is None else (turn, step[0])
            if step is not None and last is not None and seen == last:
                place = step[1]
                held += min(time.monotonic() - before, 2 * _TICK)
                if held >= BLOCKED:
                    self._block(f"the event loop has been blocked for {held:.0f} s by {place}")
            else:
                if held >= SLOW:
                    logs.warn(f"{place} blocked the event loop for {held:.1f} s")
                self.blocked, held = None, 0.0

    def _block(self, text: str) -> None:
        if self.blocked is None:
            logs.warn(f"{text}: nothing else runs, no deadline passes, and pings fail")
        self.blocked = text


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
