"""The peer's log. `logging`, whose import takes 10 ms, is imported and set up by the first that logs."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    # Of a level, a logger, a message, and a traceparent if there is one.
    SendRecord = Callable[[str, str, str, str | None], None]

_chosen: tuple[str, SendRecord | None] = ("info", None)


def choose(level: str, send: SendRecord | None) -> None:
    """Have records of `level` and above sent through `send`, which may wait, or to stderr if it is None."""
    global _chosen
    _chosen = level, send


def set_up() -> ModuleType:
    """Set up `logging`, unless that was done; returns `peer_log`."""
    from dspy_bridge.logs import peer_log

    peer_log.setup(*_chosen)
    return peer_log


def warn(text: str) -> None:
    set_up().logger.warning(text)


def exception(error: BaseException) -> str:
    """Log `error` with its traceback; returns the reference under which, for the caller to find it."""
    reference = os.urandom(4).hex()
    set_up().logger.error("internal error %s", reference, exc_info=error)
    return reference
