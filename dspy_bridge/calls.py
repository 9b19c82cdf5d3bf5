"""What the dispatcher keeps of a request under way, and what it knows of a command."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine
    from typing import Any

    from dspy_bridge.messages import Request


class Call:
    """One request from its receipt to its reply.

    For its handler: `request`; `lm_usage`, to be filled where the request asks for meta; `settle`, called with
    whether the reply is a success, just before it is sent and whatever the reason.
    """

    __slots__ = ("answered", "handle", "lm_usage", "received", "request", "settle", "started", "task", "work")

    def __init__(self, request: Request, received: float) -> None:
        self.request = request
        self.received = received
        self.started = received
        self.work: Coroutine[Any, Any, Any] | None = None
        self.task: asyncio.Task[Any] | None = None
        self.handle: asyncio.TimerHandle | None = None
        self.lm_usage: dict[str, Any] = {}
        self.settle: Callable[[bool], object] | None = None
        self.answered = False


class Command:
    """How one command is served.

    `handler(args, call)` gives the result, or a coroutine that will. `limited`: its coroutine counts towards
    the limits of what runs and waits.
    """

    __slots__ = ("handler", "limited")

    def __init__(self, handler: Callable[[dict[str, Any], Call], Any], limited: bool = False) -> None:
        self.handler = handler
        self.limited = limited
