"""The event loop: asyncio's, but connections do not keep what was under way when they were opened.

asyncio gives each callback the context in which it was registered. That of a connection which is kept open, to a
provider for one, stays for as long as the connection, and with it all that its context variables lead to: DSPy's
settings, its LMs, the arguments of the execute. 20 executes with 8 MB each left 300 MB.
"""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any


class EventLoop(asyncio.SelectorEventLoop):
    """Callbacks of descriptors get an empty context: transports need none."""

    # Where an asyncio has no such methods, these are never called.

    def _add_reader(self, *args: Any) -> Any:
        return contextvars.Context().run(super()._add_reader, *args)  # type: ignore[misc]

    def _add_writer(self, *args: Any) -> Any:
        return contextvars.Context().run(super()._add_writer, *args)  # type: ignore[misc]
