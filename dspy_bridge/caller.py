"""What the code of a run may ask of the client that called it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

# When an item of a batch must be done, in seconds of `time.monotonic`: it has less time than its call. None elsewhere.
item_ends: ContextVar[float | None] = ContextVar("item_ends", default=None)


class Caller(Protocol):
    """The client behind one `execute_program`.

    `size`: bytes of its request. `meter`: counts what the LMs are asked, if the client wants meta; else None.
    `ends`: its deadline in seconds of `time.monotonic`, or None.
    """

    size: int
    meter: Any

    @property
    def ends(self) -> float | None: ...

    async def stream_item(self, item: dict[str, Any]) -> None:
        """Send an item of the stream; returns when the client can take more. On the event loop."""

    def stream_item_threadsafe(self, item: dict[str, Any]) -> None:
        """Send an item of the stream without waiting, from any thread."""

    async def call_tool(self, name: str, args: dict[str, Any]) -> Any:
        """The result of one of the client's tools. Raises `ToolFailed`. On the event loop."""
