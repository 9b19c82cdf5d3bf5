"""Notices that code blocks the event loop. While it does, no run makes progress and no deadline passes.

The loop's selector notes when it returns and when it is called again: between the two the loop is in one turn. A thread
looks at these notes, and if the loop is in a turn at the frames of its thread.

Only the time between two timely looks counts. If the thread was late itself, the whole process did not run: it was
stopped, the machine was busy, or C code held the interpreter.
"""

from __future__ import annotations

import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from dspy_bridge.runtime.event_loop import WatchedSelector

# Between two looks, in seconds.
_TICK = 0.05
# The most that counts of a look that came late, in seconds.
_MOST = 2 * _TICK
# A step that was seen for so long is logged. It may have begun one look before, so those of 250 ms are.
SLOW = 0.25 - _TICK
# After so many seconds in one turn pings fail.
BLOCKED = 5.0
# The flags of coroutines, of generators used as such and of async generators; `inspect` takes 10 ms to import.
_COROUTINE = 0x80 | 0x100 | 0x200
# The file of frames that import a module, or wait until another thread has imported it.
_IMPORTING = "<frozen importlib."


class LoopWatch:
    """Watches one event loop. `blocked` says by what it is blocked, or is None; any thread may read it."""

    def __init__(self, warn: Callable[[str], object]) -> None:
        """`warn` logs a text, on the thread of the watch."""
        self.blocked: str | None = None
        self._warn = warn

    def start(self, selector: WatchedSelector) -> None:
        """Watch the loop of this selector, which the calling thread is going to run."""
        arguments = (selector, threading.get_ident())
        threading.Thread(target=self._watch, args=arguments, name="dspy_bridge-watch", daemon=True).start()

    def _watch(self, selector: WatchedSelector, thread: int) -> None:
        turn: float | None = None
        step: _Step | None = None
        # For how long this turn and this step were seen.
        turned = held = 0.0
        while True:
            before = time.monotonic()
            time.sleep(_TICK)
            passed = min(time.monotonic() - before, _MOST)
            last_turn, last_step = turn, step
            turn = selector.turn_began
            step = None if turn is None else _Step.of(thread)
            if turn is not None and turn == last_turn:
                turned += passed
                self._notice(turned, step)
            else:
                if self.blocked is not None:
                    self.blocked = None
                    self._warn(f"the event loop goes on after {turned:.0f} s")
                turned = 0.0
            if step is not None and turn == last_turn and last_step is not None and step.root is last_step.root:
                held += passed
                continue
            if held >= SLOW and last_step is not None:
                self._warn(f"{last_step.place} blocked the event loop for {held:.1f} s")
            held = 0.0

    def _notice(self, turned: float, step: _Step | None) -> None:
        if turned < BLOCKED or step is None or step.importing:
            return
        text = f"the event loop has been blocked for {turned:.0f} s by {step.place}"
        if self.blocked is None:
            self._warn(f"{text}: nothing else runs, no deadline passes, and pings fail")
        self.blocked = text


class _Step:
    """What a thread runs. `root` identifies it: the outermost coroutine's frame. `place` names the innermost one and
    its line. `importing`: it imports a module, or waits for one."""

    __slots__ = ("importing", "place", "root")

    def __init__(self, root: FrameType, innermost: FrameType, importing: bool) -> None:
        self.root = root
        self.importing = importing
        code = innermost.f_code
        # Before Python 3.11 code has no qualified name.
        name = getattr(code, "co_qualname", code.co_name)
        self.place = f"{innermost.f_globals.get('__name__')}.{name}, line {innermost.f_lineno}"

    @classmethod
    def of(cls, thread: int) -> _Step | None:
        """The step of a thread."""
        frame = first = sys._current_frames().get(thread)
        if first is None:
            return None
        coroutines: list[FrameType] = []
        importing = False
        while frame is not None:
            if frame.f_code.co_flags & _COROUTINE:
                coroutines.append(frame)
            elif not coroutines:
                importing = importing or frame.f_code.co_filename.startswith(_IMPORTING)
            frame = frame.f_back
        if not coroutines:
            return cls(first, first, importing)
        return cls(coroutines[-1], coroutines[0], importing)
