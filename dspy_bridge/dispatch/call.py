"""What the dispatcher keeps of a request under way, and what it knows of a command."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine
    from typing import Any

    from dspy_bridge.dispatch.call_channel import Conversation
    from dspy_bridge.dispatch.limiter import Turns
    from dspy_bridge.wire.messages import Request


class Host:
    """What the dispatcher has for the coroutines of calls, shared by all.

    `turns`: for a call that takes its turns itself; `describe(error)`: what a reply would say of an exception.
    """

    __slots__ = ("conversation", "describe", "turns")

    def __init__(
        self, conversation: Conversation, turns: Turns, describe: Callable[[BaseException], dict[str, Any]]
    ) -> None:
        self.conversation = conversation
        self.turns = turns
        self.describe = describe


class Call:
    """One request from its receipt to its reply.

    For its handler: `request` and its `size` in bytes; `host`; `meter`, whose `summary()` goes into meta; `gave_turn`,
    for a coroutine that has given its turn to a part of itself; `settle`, called with whether the reply is a success,
    just before it is sent and whatever the reason.
    """

    __slots__ = (
        "answered",
        "gave_turn",
        "handle",
        "host",
        "meter",
        "received",
        "request",
        "settle",
        "size",
        "start",
        "started",
        "task",
        "work",
    )

    def __init__(self, request: Request, received: float, host: Host, size: int = 0) -> None:
        self.request = request
        self.size = size
        self.received = received
        self.host = host
        self.started = received
        self.work: Coroutine[Any, Any, Any] | None = None
        self.task: asyncio.Task[Any] | None = None
        self.handle: asyncio.TimerHandle | None = None
        # What its turn begins with.
        self.start: Callable[[], bool] | None = None
        self.meter: Any = None
        self.gave_turn = False
        self.settle: Callable[[bool], object] | None = None
        self.answered = False

    async def tell(self, item: dict[str, Any]) -> None:
        """Send an item of the stream; slowed to what the caller takes. On the event loop."""
        await self.host.conversation.tell(self, item)

    def note(self, item: dict[str, Any]) -> None:
        """Send an item of the stream, from any thread."""
        self.host.conversation.note(self, item)

    async def ask(self, tool: str, args: dict[str, Any]) -> Any:
        """Have a tool of the caller's called. Raises `ToolFailed`. On the event loop."""
        return await self.host.conversation.ask(self, tool, args)


class Command:
    """How one command is served.

    `handler(args, call)` gives the result, or a coroutine that will. `limited`: its coroutine waits for its turn,
    within the limits of what runs and waits.
    """

    __slots__ = ("handler", "limited")

    def __init__(self, handler: Callable[[dict[str, Any], Call], Any], limited: bool = False) -> None:
        self.handler = handler
        self.limited = limited
