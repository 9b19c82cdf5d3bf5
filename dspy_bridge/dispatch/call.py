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


class CallServices:
    """What the dispatcher offers to all calls.

    `limiter`: for a call that acquires further slots itself. `describe(error)`: an exception as a reply shows it.
    """

    __slots__ = ("channel", "describe", "limiter")

    def __init__(
        self, channel: CallChannel, limiter: Limiter, describe: Callable[[BaseException], dict[str, Any]]
    ) -> None:
        self.channel = channel
        self.limiter = limiter
        self.describe = describe


class Call:
    """One request from its receipt to its reply.

    For its handler: `request` and its `size` in bytes; `services`; `meter`, whose `summary()` goes into meta;
    `slot_transferred`, set by a call that has handed its slot to a sub-task, which releases it; `on_reply`, called with
    whether the reply is a success, just before the reply is sent.
    """

    __slots__ = (
        "answered",
        "deadline",
        "id",
        "meter",
        "on_reply",
        "received",
        "request",
        "services",
        "size",
        "slot_transferred",
        "start",
        "started",
        "task",
        "work",
    )

    def __init__(self, request: Request, received: float, services: CallServices, size: int = 0) -> None:
        self.id = request.id
        self.request = request
        self.size = size
        self.received = received
        self.services = services
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
        await self.services.channel.stream_item(self, item)

    def stream_item_threadsafe(self, item: dict[str, Any]) -> None:
        self.services.channel.stream_item_threadsafe(self, item)

    async def call_tool(self, name: str, args: dict[str, Any]) -> Any:
        return await self.services.channel.call_tool(self, name, args)


class Command:
    """How one command is served.

    `handler(args, call)` returns the result, or a coroutine that does. `limited`: the coroutine waits for a slot of the
    limiter.
    """

    __slots__ = ("handler", "limited")

    def __init__(self, handler: Callable[[dict[str, Any], Call], Any], limited: bool = False) -> None:
        self.handler = handler
        self.limited = limited
