"""A request in flight, its slot, and its traffic with the client: items of its stream, tool calls and their results.

Runs on the event loop's thread, except where a method says otherwise. After a call's reply nothing more is sent for it,
and the result of a tool that it called is dropped.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from dspy_bridge.errors import FrameTooLarge, ToolFailed
from dspy_bridge.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine
    from typing import Any

_NO_ANSWER = "the end of input has come; no answer can"


class Call:
    """One request from its receipt to its reply.

    For its handler: `request` and its `size` in bytes; `limiter`, if it acquires further slots; `meter`, whose
    `summary()` goes into meta; `limited`, set by a handler whose coroutine waits for a slot; `slot_transferred`, set by
    a call that has handed its slot to a sub-task, which releases it; `on_reply`, called with whether the reply is a
    success, just before the reply is sent.
    """

    def __init__(
        self, request: messages.Request, received: float, size: int, channel: Channel, limiter: Limiter
    ) -> None:
        self.id = request.id
        self.request = request
        self.received = received
        self.size = size
        self._channel = channel
        self.limiter = limiter
        # None while it waits for the event loop or a slot.
        self.started: float | None = received
        self.work: Coroutine[Any, Any, Any] | None = None
        self.task: asyncio.Task[Any] | None = None
        # When its deadline is, in seconds of `time.monotonic`, which is the clock of the loop; and its timer.
        self.ends: float | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.slot: asyncio.Future[None] | None = None
        self.meter: Any = None
        self.limited = self.slot_transferred = False
        self.on_reply: Callable[[bool], object] | None = None
        # What the reply's meta has even if the request does not ask for meta, by name.
        self.accounts: dict[str, Callable[[], dict[str, Any]]] = {}
        self.answered = False

    async def stream_item(self, item: dict[str, Any]) -> None:
        """Send an item of the stream; returns when the client can take more."""
        self._send_item(item)
        while not self.answered and (room := self._channel.room()) is not None:
            await room

    async def send_written(self, payload: bytes) -> None:
        """Send a payload; if the pipe is full, returns once it is in it.

        If not, it is written with what follows in this step of the loop: a write of its own takes 5 % of an LM call.
        """
        if not self.answered:
            self._channel.push(payload)
        while not self.answered and (written := self._channel.room(written=True)) is not None:
            await written

    @property
    def max_bytes(self) -> int:
        """Of a frame."""
        return self._channel.max_bytes

    def stream_item_threadsafe(self, item: dict[str, Any]) -> None:
        """The same without waiting, from any thread."""
        if threading.get_ident() == self._channel.thread:
            self._send_item(item)  # now, to keep the order of this thread's items
        else:
            self._channel.loop.call_soon_threadsafe(self._send_item, item)

    async def call_tool(self, name: str, args: dict[str, Any]) -> Any:
        """The result of one of the client's tools. Raises `ToolFailed`."""
        if self.answered:
            import asyncio

            # Code that swallowed its cancellation: the client would never answer.
            raise asyncio.CancelledError("the execute is over")
        return await self._channel.call_tool(self.id, name, args)

    def _send_item(self, item: dict[str, Any]) -> None:
        if self.answered:
            return
        payload = messages.encode_stream(self.id, item)
        if len(payload) > self._channel.max_bytes:
            text = f"the item has {len(payload)} bytes: expected at most {self._channel.max_bytes}"
            which: dict[str, Any] = {key: item[key] for key in ("index", "field") if key in item}
            which.update(messages.failure(FrameTooLarge.error_type, text))
            payload = messages.encode_stream(self.id, which)
        self._channel.push(payload)


class Channel:
    """What calls share. `push` sends a payload in order with the replies; `when_room`: see `FrameWriter`."""

    # Set on the loop's thread, before there are tasks.
    loop: asyncio.AbstractEventLoop
    thread = 0

    def __init__(self, push: Callable[[bytes], None], when_room: Callable[..., bool], max_bytes: int) -> None:
        self.push = push
        self._when_room = when_room
        self.max_bytes = max_bytes
        self._last_call_id = 0
        self._pending: dict[int, asyncio.Future[messages.ToolResult]] = {}
        self._closed = False

    async def call_tool(self, id: messages.Id, name: str, args: dict[str, Any]) -> Any:
        """The result of one of the client's tools. Raises `ToolFailed` with the client's error text."""
        self._last_call_id += 1
        call_id = self._last_call_id
        payload = messages.encode_tool_call(id, call_id, name, args)
        if len(payload) > self.max_bytes:
            raise FrameTooLarge(f"tool {name}: arguments of {len(payload)} bytes: at most {self.max_bytes}")
        if self._closed:
            raise ToolFailed(f"{name}: {_NO_ANSWER}")
        pending = self._pending[call_id] = self.loop.create_future()
        self.push(payload)
        try:
            result = await pending
        finally:
            del self._pending[call_id]
        if result.error is not None:
            raise ToolFailed(f"{name}: {result.error}")
        return result.value

    def made_call(self, call_id: int) -> bool:
        """Whether there ever was such a tool call. From any thread."""
        return 0 < call_id <= self._last_call_id

    def deliver(self, result: messages.ToolResult) -> None:
        """Hand the result to the tool call that waits for it, if one does."""
        pending = self._pending.get(result.call_id)
        if pending is not None and not pending.done():
            pending.set_result(result)

    def close(self) -> None:
        """Fail all tool calls, now and later: after the end of input none gets an answer."""
        self._closed = True
        for call_id in self._pending:
            self.deliver(messages.ToolResult(call_id, None, _NO_ANSWER))

    def room(self, *, written: bool = False) -> asyncio.Future[None] | None:
        """None if there is room now (`written`: if all is in the pipe), else a future that is done when there is."""
        room: asyncio.Future[None] = self.loop.create_future()

        def found() -> None:
            if not room.done():
                room.set_result(None)

        waits = self._when_room(lambda: self.loop.call_soon_threadsafe(found), written=written)
        return room if waits else None


class Limiter:
    """A semaphore with a bounded queue: at most `max_running` slots are taken at once; past `max_waiting` it is `full`.

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
