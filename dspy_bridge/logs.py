"""Log records go to stderr, or as frames to the owner; never with contents or secrets. Imported when first needed."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time

from dspy_bridge import messages, redaction, tracing, withholding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

logger = logging.getLogger("dspy_bridge")

# Records that wait for stderr: some 2 MB of tracebacks.
MAX_WAITING = 1000
_FLUSH_SECONDS = 0.5


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redaction.redact(super().format(withholding.without_contents(record)))


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


class _Stderr(logging.Handler):
    """Writes on a thread of its own: a stderr that nobody reads any more must hold up no execute.

    What it does not take meanwhile is kept up to a bound, then dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str] = queue.Queue(MAX_WAITING)
        threading.Thread(target=self._write, name="dspy_bridge-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            pass
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Called by `logging` at the exit, too: what waits is written, if somebody reads it."""
        end = time.monotonic() + _FLUSH_SECONDS
        while self._lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            rest = (self._lines.get() + "\n").encode("utf-8", "replace")
            try:
                while rest:
                    rest = rest[os.write(2, rest) :]
            except OSError:
                pass  # nobody reads the log; that must cost nobody a reply
            self._lines.task_done()


class _Frames(logging.Handler):
    """Each record is a frame, a traceback included."""

    def __init__(self, send: Callable[[Iterable[bytes]], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level, text = record.levelname.lower(), self.format(record)
            self._send([messages.encode_log(level, record.name, text, tracing.current())])
        except Exception:
            self.handleError(record)


# At debug level these tell whole prompts and answers.
_TALKATIVE = ("asyncio", "dspy", "httpcore", "httpx", "openai", "urllib3")
# These tell of each call, at info, that it is one; and bring a handler of their own when they are imported, long after
# this.
_OWN_HANDLERS = ("LiteLLM", "LiteLLM Proxy", "LiteLLM Router")


def setup(level: str, send: Callable[[Iterable[bytes]], None] | None) -> None:
    """Send records of `level` and above to stderr, or through `send` as frames. Later calls change nothing."""
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


def exception() -> str:
    """Log the exception being handled; returns the reference under which, for its caller to be told."""
    reference = os.urandom(4).hex()
    logger.error("internal error %s", reference, exc_info=True)
    return reference
