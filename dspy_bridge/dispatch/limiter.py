"""A semaphore with a bounded queue: limits how many runs are in flight. Used on the event loop's thread only."""

from __future__ import annotations

from collections import OrderedDict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Limiter:
    """At most `max_running` slots are taken at once; past `max_waiting` waiters it is `full`.

    Waiters get slots in their order. Any thread may read the counts.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running = max_running
        self._max_waiting = max_waiting
        self.running = 0
        # Ordered, and a waiter that withdraws is found at once.
        self._waiting: OrderedDict[Callable[[], bool], None] = OrderedDict()

    @property
    def full(self) -> bool:
        """Whether all slots are taken and no more waiters fit."""
        return self.running >= self.max_running and len(self._waiting) >= self._max_waiting

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._waiting)

    def submit(self, start: Callable[[], bool]) -> None:
        """Call `start` when a slot is free, perhaps now. It returns whether it takes the slot, to be released later."""
        self._waiting[start] = None
        self._start_waiting()

    def withdraw(self, start: Callable[[], bool]) -> None:
        """Remove `start`, if it still waits."""
        self._waiting.pop(start, None)

    def release(self) -> None:
        """Free a slot; the next waiter gets it."""
        self.running -= 1
        self._start_waiting()

    async def acquire(self) -> None:
        """Wait for a slot."""
        import asyncio

        slot = asyncio.get_running_loop().create_future()

        def start() -> bool:
            if slot.cancelled():
                return False
            slot.set_result(None)
            return True

        self.submit(start)
        try:
            await slot
        except asyncio.CancelledError:
            if slot.cancelled():
                self.withdraw(start)  # `start` may have been called meanwhile, and have refused
            else:
                self.release()  # cancelled just after it got the slot
            raise

    def _start_waiting(self) -> None:
        # A loop, not recursion: after many cancels at once, thousands may refuse their slot in a row.
        while self._waiting and self.running < self.max_running:
            start, _ = self._waiting.popitem(last=False)
            self.running += 1
            if not start():
                self.running -= 1
