"""A semaphore with a bounded queue: limits how many runs are in flight. Used on the event loop's thread only."""

from __future__ import annotations

from collections import OrderedDict

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio


class Limiter:
    """At most `max_running` slots are taken at once; past `max_waiting` waiters it is `full`.

    A slot is a future, done when it is taken. Waiters get them in their order. Any thread may read the counts.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running = max_running
        self._max_waiting = max_waiting
        self.running = 0
        # Ordered, and a waiter that leaves is found at once.
        self.waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    @property
    def full(self) -> bool:
        return self.running >= self.max_running and len(self.waiting) >= self._max_waiting

    def slot(self) -> asyncio.Future[None]:
        """A slot to wait for: the caller must `leave` it, or `release` it once it is done."""
        import asyncio

        slot = asyncio.get_running_loop().create_future()
        self.waiting[slot] = None
        self._grant()
        return slot

    def leave(self, slot: asyncio.Future[None]) -> None:
        """Free the slot, or the place in the queue."""
        if slot.done() and not slot.cancelled():
            self.release()
        else:
            self.waiting.pop(slot, None)

    def release(self) -> None:
        """Free a slot; the next waiter gets it."""
        self.running -= 1
        self._grant()

    async def acquire(self) -> None:
        slot = self.slot()
        try:
            await slot
        except BaseException:
            self.leave(slot)
            raise

    def _grant(self) -> None:
        while self.waiting and self.running < self.max_running:
            slot, _ = self.waiting.popitem(last=False)
            if not slot.done():
                self.running += 1
                slot.set_result(None)
