"""The traffic between a running call and its client: items of its stream, tool calls and their results.

Runs on the event loop's thread, except where a method says otherwise. After a call's reply nothing more is sent for it,
and the result of a tool that it called is dropped.
"""

from __future__ import annotations

import threading

from dspy_bridge.errors import FrameTooLarge, ToolFailed
from dspy_bridge.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import Any, Protocol

    class OpenCall(Protocol):
        """A call as the channel sees it."""

        id: messages.Id
        answered: bool


_NO_ANSWER = "the end of input has come; no answer can"


class CallChannel:
    """The channel of all calls. `push` sends a payload in order with the replies; `when_room`: see `FrameWriter`."""

    def __init__(
        self,
        push: Callable[[bytes], None],
        when_room: Callable[[Callable[[], object]], bool],
        max_frame_bytes: int,
    ) -> None:
        self._push = push
        self._when_room = when_room
        self._max_frame_bytes = max_frame_bytes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._last_call_id = 0
        self._pending: dict[int, asyncio.Future[messages.ToolResult]] = {}
        self._closed = False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the event loop, on its thread."""
        self._loop = loop
        self._thread = threading.get_ident()

    async def stream_item(self, call: OpenCall, item: dict[str, Any]) -> None:
        """Send an item of the call's stream. Returns when there is room for more, which slows the LM's own stream."""
        self._send_item(call, item)
        while not call.answered:
            room = self._room()
            if room is None:
                return
            await room

    def stream_item_threadsafe(self, call: OpenCall, item: dict[str, Any]) -> None:
        """The same from any thread, without waiting: only for items that are short and rare."""
        assert self._loop is not None
        if threading.get_ident() == self._thread:
            self._send_item(call, item)  # now, to keep the order of this thread's items
        else:
            self._loop.call_soon_threadsafe(self._send_item, call, item)

    async def call_tool(self, call: OpenCall, name: str, args: dict[str, Any]) -> Any:
        """The result of a tool of the client's. Raises `ToolFailed` with the client's error text."""
        import asyncio

        assert self._loop is not None
        if call.answered:
            # Code that swallowed its cancellation: the client would never answer.
            raise asyncio.CancelledError("the execute is over")
        self._last_call_id += 1
        call_id = self._last_call_id
        payload = messages.encode_tool_call(call.id, call_id, name, args)
        if len(payload) > self._max_frame_bytes:
            raise FrameTooLarge(f"tool {name}: arguments of {len(payload)} bytes: at most {self._max_frame_bytes}")
        pending = self._pending[call_id] = self._loop.create_future()
        try:
            if self._closed:
                raise ToolFailed(f"{name}: {_NO_ANSWER}")
            self._push(payload)
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
        """Fail all tool calls, now and later: after the end of input none gets an answer. From any thread."""
        self._closed = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._fail_pending)

    def _fail_pending(self) -> None:
        for call_id in self._pending:
            self.deliver(messages.ToolResult(call_id, None, _NO_ANSWER))

    def _send_item(self, call: OpenCall, item: dict[str, Any]) -> None:
        if call.answered:
            return
        payload = messages.encode_stream(call.id, item)
        if len(payload) > self._max_frame_bytes:
            text = f"the item has {len(payload)} bytes: expected at most {self._max_frame_bytes}"
            failure = messages.failure(FrameTooLarge.error_type, text)
            which: dict[str, Any] = {key: item[key] for key in ("index", "field") if key in item}
            payload = messages.encode_stream(call.id, {**which, **failure})
        self._push(payload)

    def _room(self) -> asyncio.Future[None] | None:
        """None if there is room now, else a future that is done when there is."""
        assert self._loop is not None
        loop = self._loop
        room: asyncio.Future[None] = loop.create_future()

        def found() -> None:
            if not room.done():
                room.set_result(None)

        return room if self._when_room(lambda: loop.call_soon_threadsafe(found)) else None
