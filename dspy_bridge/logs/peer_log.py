"""Log records go to stderr, or as frames to the owner; never with contents or secrets. Imported when first needed."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time

from dspy_bridge import tracing
from dspy_bridge.logs import content_filter, redaction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    # Level, logger, message, and the traceparent if there is one.
    SendRecord = Callable[[str, str, str, str | None], None]

logger = logging.getLogger("dspy_bridge")

# Records that wait for stderr, or for their frames to be read; and what each counts beside its text.
MAX_WAITING_BYTES = 2 << 20
_ITEM_BYTES = 200
_FLUSH_SECONDS = 0.5


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redaction.redact(super().format(content_filter.without_contents(record)))


class _Traced(logging.Filter):
    """On a handler: its records have `of_trace`, for the line, of the request that they were made for."""

    def filter(self, record: logging.LogRecord) -> bool:
        traceparent = tracing.current()
        record.of_trace = "" if traceparent is None else f" traceparent={traceparent}"
        return True


class _Diverted(logging.Filter):
    """On a logger: its records go to a handler of ours and to no other."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= self._handler.level:
            self._handler.handle(record)
        return False


class _Queued(logging.Handler):
    """Writes on a thread of its own: a reader that is slow, or gone, holds up nobody who logs.

    Who logs may be a finalizer, on any thread and within any lock: so nothing is locked here but what such a one may
    lock again, and the queue is one of those. What waits is bounded; past that records are dropped, and counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._items: queue.SimpleQueue[tuple[int, str, str, str, str | None]] = queue.SimpleQueue()
        # Each is changed by one side alone: these within the handler's lock, the others by the thread.
        self._taken = self._dropped = 0
        self._written = self._told = 0
        threading.Thread(target=self._write_all, name="dspy_bridge-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._taken - self._written >= MAX_WAITING_BYTES:
                self._dropped += 1
                return
            text = self.format(record)
            size = len(text) + _ITEM_BYTES
            self._taken += size
            self._items.put((size, record.levelname.lower(), record.name, text, tracing.current()))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Called by `logging` at the exit, too: what waits is written, if somebody reads it."""
        end = time.monotonic() + _FLUSH_SECONDS
        while self._written != self._taken and time.monotonic() < end:
            time.sleep(0.005)

    def _write_all(self) -> None:
        while True:
            size, level, name, text, traceparent = self._items.get()
            self._write(level, name, text, traceparent)
            dropped = self._dropped - self._told
            if dropped and self._items.empty():
                self._told += dropped
                text = f"{dropped} log records were dropped: nobody read them in time"
                record = logger.makeRecord(logger.name, logging.WARNING, __file__, 0, text, (), None)
                self.filter(record)
                self._write("warning", logger.name, self.format(record), None)
            self._written += size

    def _write(self, level: str, name: str, text: str, traceparent: str | None) -> None:
        raise NotImplementedError


class _Stderr(_Queued):
    def _write(self, level: str, name: str, text: str, traceparent: str | None) -> None:
        rest = (text + "\n").encode("utf-8", "replace")
        try:
            while rest:
                rest = rest[os.write(2, rest) :]
        except OSError:
            pass  # nobody reads the log; that must cost nobody a reply


class _Frames(_Queued):
    """Each record is a frame, a traceback included."""

    def __init__(self, send: SendRecord) -> None:
        self._send = send
        super().__init__()

    def _write(self, level: str, name: str, text: str, traceparent: str | None) -> None:
        self._send(level, name, text, traceparent)


# At debug level these tell whole prompts and answers.
_TALKATIVE = ("asyncio", "dspy", "httpcore", "httpx", "openai", "urllib3")
# These tell of each call, at info, that it is one; and bring a handler of their own when they are imported, long after
# this.
_OWN_HANDLERS = ("LiteLLM", "LiteLLM Proxy", "LiteLLM Router")


def setup(level: str, send: SendRecord | None) -> None:
    """Send records of `level` and above to stderr, or as frames through `send`, which may wait for their reader.

    Later calls change nothing.
    """
    root = logging.getLogger()
    if any(isinstance(handler.formatter, _Redacted) for handler in root.handlers):
        return
    handler: logging.Handler
    if send is None:
        handler = _Stderr()
        handler.addFilter(_Traced())
        handler.setFormatter(_Redacted(f"dspy_bridge[{os.getpid()}] %(levelname)s %(name)s%(of_trace)s: %(message)s"))
    else:
        handler = _Frames(send)
        handler.setFormatter(_Redacted("%(message)s"))
    # Also the handler: dspy's logger has a level of its own.
    handler.setLevel(level.upper())
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.INFO, root.level))
    for name in _OWN_HANDLERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
        logging.getLogger(name).addFilter(_Diverted(handler))
    logging.captureWarnings(True)


def adopt(name: str) -> None:
    """Have the records of a library that brings a handler of its own take our way."""
    library = logging.getLogger(name)
    library.handlers.clear()
    library.propagate = True


def exception(error: BaseException) -> str:
    """Log `error` with its traceback; returns the reference under which, for the caller to find it."""
    reference = os.urandom(4).hex()
    logger.error("internal error %s", reference, exc_info=error)
    return reference
