"""What goes between an execute under way and its caller: chunks of a stream, questions to tools and their answers.

Of the event loop's thread, but for `note`, `asked` and `hang_up`. Nothing is told after the reply; an answer that finds
nobody, since the execute is over, is dropped.
"""

from __future__ import annotations

import threading

from dspy_bridge.errors import FrameTooLarge, ToolFailed
from dspy_bridge.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import Any

    from dspy_bridge.dispatch.call import Call

_NOBODY = "the end of input has come; no answer can"


class Conversation:
    """The conversations of all calls; `push` sends a payload in the order of all, `when_room` is `Writer`'s."""

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
        self._asked: dict[int, asyncio.Future[messages.ToolResult]] = {}
        self._hung_up = False

    def on(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that all this happens on, called on its thread."""
        self._loop = loop
        self._thread = threading.get_ident()

    async def tell(self, call: Call, item: dict[str, Any]) -> None:
        """Send an item of the call's stream. Returns once there is room for more: this slows the LM's own stream."""
        self._tell(call, item)
        while not call.answered:
            room = self._room()
            if room is None:
                return
            await room

    def note(self, call: Call, item: dict[str, Any]) -> None:
        """The same from any thread, without waiting. For what is short and rare."""
        assert self._loop is not None
        if threading.get_ident() == self._thread:
            self._tell(call, item)  # in the order of what this thread sends besides
        else:
            self._loop.call_soon_threadsafe(self._tell, call, item)

    async def ask(self, call: Call, name: str, args: dict[str, Any]) -> Any:
        """Have a tool of the caller's called; gives its result. Raises `ToolFailed` with the caller's text."""
        import asyncio

        assert self._loop is not None
        if call.answered:
            # Code that has swallowed its cancellation: nobody would ever answer this.
            raise asyncio.CancelledError("the execute is over")
        self._last_call_id += 1
        call_id = self._last_call_id
        payload = messages.encode_tool_call(call.request.id, call_id, name, args)
        if len(payload) > self._max_frame_bytes:
            raise FrameTooLarge(f"tool {name}: arguments of {len(payload)} bytes: at most {self._max_frame_bytes}")
        answer = self._asked[call_id] = self._loop.create_future()
        try:
            if self._hung_up:
                raise ToolFailed(f"{name}: {_NOBODY}")
            self._push(payload)
            result = await answer
        finally:
            del self._asked[call_id]
        if result.error is not None:
            raise ToolFailed(f"{name}: {result.error}")
        return result.value

    def asked(self, call_id: int) -> bool:
        """Whether there was ever such a tool call; from any thread."""
        return 0 < call_id <= self._last_call_id

    def answer(self, result: messages.ToolResult) -> None:
        """The caller has answered."""
        asked = self._asked.get(result.call_id)
        if asked is not None and not asked.done():
            asked.set_result(result)

    def hang_up(self) -> None:
        """The end of input: nothing that is asked can be answered any more. From any thread."""
        self._hung_up = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._answer_all)

    def _answer_all(self) -> None:
        for call_id in self._asked:
            self.answer(messages.ToolResult(call_id, None, _NOBODY))

    def _tell(self, call: Call, item: dict[str, Any]) -> None:
        if call.answered:
            return
        payload = messages.encode_stream(call.request.id, item)
        if len(payload) > self._max_frame_bytes:
            text = f"the item has {len(payload)} bytes: expected at most {self._max_frame_bytes}"
            failure = messages.failure(FrameTooLarge.error_type, text)
            place: dict[str, Any] = {key: item[key] for key in ("index", "field") if key in item}
            payload = messages.encode_stream(call.request.id, {**place, **failure})
        self._push(payload)

    def _room(self) -> asyncio.Future[None] | None:
        """Done when there is room; None if there is."""
        assert self._loop is not None
        loop = self._loop
        room: asyncio.Future[None] = loop.create_future()

        def found() -> None:
            if not room.done():
                room.set_result(None)

        return room if self._when_room(lambda: loop.call_soon_threadsafe(found)) else None
