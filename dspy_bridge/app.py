"""Builds the dispatcher that the port program and `erlport` share. Logging is set up when first needed."""

from __future__ import annotations

from dspy_bridge.commands.handlers import LIMITED, Commands
from dspy_bridge.dispatch.dispatcher import Dispatcher
from dspy_bridge.port import stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

    from dspy_bridge.logs.peer_log import SendRecord
    from dspy_bridge.settings import Settings


def build_dispatcher(
    settings: Settings,
    send: Callable[[Iterable[bytes]], None],
    *,
    send_log: SendRecord | None = None,
    when_room: Callable[[Callable[[], object]], bool] = lambda _callback: False,
) -> Dispatcher:
    """The dispatcher of the six commands. `send` and `when_room` are as for `Dispatcher`.

    `send_log` sends a log record to the owner, where the settings ask for log frames; without it all go to stderr.
    """
    if not settings.log_frames:
        send_log = None

    def log() -> ModuleType:
        return set_up_logs(settings.log_level, send_log)

    commands = Commands(settings, log, lambda: dispatcher.counts())
    dispatcher = Dispatcher(
        commands.table(),
        send,
        limited=LIMITED,
        # A run has a connection to its LM.
        max_in_flight=min(settings.max_in_flight, stdio.raise_open_files()),
        max_queue=settings.max_queue,
        max_frame_bytes=settings.max_frame_bytes,
        log_exception=lambda error: log().exception(error),
        when_room=when_room,
        on_start=commands.preload,
        log_warning=lambda text: log().logger.warning(text),
    )
    return dispatcher


def set_up_logs(level: str, send: SendRecord | None = None) -> ModuleType:
    """Set up logging, if nothing has yet, as `peer_log.setup` does; returns `peer_log`."""
    from dspy_bridge.logs import peer_log

    peer_log.setup(level, send)
    return peer_log
