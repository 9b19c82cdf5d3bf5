"""Whose turn it is: executes run up to a limit, the rest waits in order. Of the event loop's thread alone."""

from __future__ import annotations

from collections import OrderedDict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Turns:
    """At most `most` turns at once; up to `most_waiting` more may wait before `full`. The counts may be read by any."""

    def __init__(self, most: int, most_waiting: int) -> None:
        self._most = most
        self._most_waiting = most_waiting
        self.running = 0
        # In their order; who withdraws is found at once.
        self._waiting: OrderedDict[Callable[[], bool], None] = OrderedDict()

    @property
    def full(self) -> bool:
        """Whether as many run and wait as may."""
        return self.running >= self._most and len(self._waiting) >= self._most_waiting

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def enter(self, start: Callable[[], bool]) -> None:
        """Call `start` when a turn is free, perhaps now. It returns whether it takes the turn: then `leave` is called
        at its end.
        """
        self._waiting[start] = None
        self._give()

    def withdraw(self, start: Callable[[], bool]) -> None:
        """`start`, which waits, is not to be called any more."""
        del self._waiting[start]

    def leave(self) -> None:
        """A turn is over: the next one begins."""
        self.running -= 1
        self._give()

    def _give(self) -> None:
        # A loop: thousands may refuse their turn in a row, when thousands were cancelled at once.
        while self._waiting and self.running < self._most:
            start, _ = self._waiting.popitem(last=False)
            self.running += 1
            if not start():
                self.running -= 1

    async def take(self) -> None:
        """Wait for a turn of one's own: for calls that need one after another."""
        import asyncio

        turn = asyncio.get_running_loop().create_future()

        def start() -> bool:
            if turn.cancelled():
                return False
            turn.set_result(None)
            return True

        self.enter(start)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.pop(start, None)  # unless its turn has come meanwhile, and was refused
            else:
                self.leave()  # cancelled in the moment in which its turn had come
            raise
