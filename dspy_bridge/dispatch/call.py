"""A request in flight, and how a command is served."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine
    from typing import Any

    from dspy_bridge.dispatch.call_channel import CallChannel
    from dspy_bridge.dispatch.limiter import Limiter
    from dspy_bridge.wire.messages import Request


class Call:
    """One request from its receipt to its reply.

    For its handler: `request` and its `size` in bytes; `limiter`, if it acquires further slots; `describe(error)`, an
    exception as a reply shows it; `meter`, whose `summary()` goes into meta; `slot_transferred`, set by a call that has
    handed its slot to a sub-task, which releases it; `on_reply`, called with whether the reply is a success, just
    before the reply is sent.
    """

    def __init__(
        self,
        request: Request,
        received: float,
        size: int,
        channel: CallChannel,
        limiter: Limiter,
        describe: Callable[[BaseException], dict[str, Any]],
    ) -> None:
        self.id = request.id
        self.request = request
        self.received = received
        self.size = size
        self._channel = channel
        self.limiter = limiter
        self.describe = describe
        self.started = received
        self.work: Coroutine[Any, Any, Any] | None = None
        self.task: asyncio.Task[Any] | None = None
        self.deadline: asyncio.TimerHandle | None = None
        # What the limiter calls when there is a slot.
        self.start: Callable[[], bool] | None = None
        self.meter: Any = None
        self.slot_transferred = False
        self.on_reply: Callable[[bool], object] | None = None
        self.answered = False

    # What follows is `Caller`.

    @property
    def ends(self) -> float | None:
        # The loop's clock is `time.monotonic`.
        return None if self.deadline is None else self.deadline.when()

    async def stream_item(self, item: dict[str, Any]) -> None:
        await self._channel.stream_item(self, item)

    def stream_item_threadsafe(self, item: dict[str, Any]) -> None:
        self._channel.stream_item_threadsafe(self, item)

    async def call_tool(self, name: str, args: dict[str, Any]) -> Any:
        return await self._channel.call_tool(self, name, args)


class Command:
    """How one command is served.

    `handler(args, call)` returns the result, or a coroutine that does. `limited`: the coroutine waits for a slot of the
    limiter.
    """

    __slots__ = ("handler", "limited")

    def __init__(self, handler: Callable[[dict[str, Any], Call], Any], limited: bool = False) -> None:
        self.handler = handler
        self.limited = limited
