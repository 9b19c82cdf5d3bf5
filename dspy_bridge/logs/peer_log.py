"""Sends log records to stderr, or as frames to the owner, without contents and secrets. Imported when first needed.

The message of a library's record or of an exception may quote an LM's answer or a client's inputs. So of an exception
its type and its places in the code are logged, of a library's record its place.
"""

from __future__ import annotations

import copy
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dspy_bridge import tracing
from dspy_bridge.logs import redaction

if TYPE_CHECKING:
    from dspy_bridge.logs import SendRecord

logger = logging.getLogger("dspy_bridge")

# The limit of the queue for stderr or frames, and what a record counts in addition to its text.
MAX_WAITING_BYTES = 2 << 20
_ITEM_BYTES = 200
_FLUSH_SECONDS = 0.5


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """The record without contents and secrets; `of_trace` is the trace of the current request."""
        traceparent = tracing.current()
        record.of_trace = "" if traceparent is None else f" traceparent={traceparent}"
        return redaction.redact(super().format(without_contents(record)))


class _Queued(logging.Handler):
    """Writes on a thread of its own, so that a slow reader does not block the code that logs.

    A finalizer may log, on any thread and within any lock: so only reentrant locks are used here, and a queue that is
    reentrant too. The queue is bounded; further records are dropped and counted.
    """

    def __init__(self, write: SendRecord) -> None:
        super().__init__()
        self._write = write
        self._items: queue.SimpleQueue[tuple[int, str, str, str, str | None]] = queue.SimpleQueue()
        # Each is changed by one side alone: these two within the handler's lock, the others by the thread.
        self._taken = self._dropped = 0
        self._written = self._reported = 0
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
        """Wait until the queue is written, if it is read. `logging` calls this at exit, too."""
        end = time.monotonic() + _FLUSH_SECONDS
        while self._written != self._taken and time.monotonic() < end:
            time.sleep(0.005)

    def _write_all(self) -> None:
        while True:
            size, level, name, text, traceparent = self._items.get()
            self._write(level, name, text, traceparent)
            dropped = self._dropped - self._reported
            if dropped and self._items.empty():
                self._reported += dropped
                text = f"{dropped} log records were dropped: nobody read them in time"
                record = logger.makeRecord(logger.name, logging.WARNING, __file__, 0, text, (), None)
                self._write("warning", logger.name, self.format(record), None)
            self._written += size


def _to_stderr(_level: str, _name: str, text: str, _traceparent: str | None) -> None:
    rest = (text + "\n").encode("utf-8", "replace")
    try:
        while rest:
            rest = rest[os.write(2, rest) :]
    except OSError:
        pass  # nobody reads the log; replies must not depend on it


# At debug level these log whole prompts and answers.
_TALKATIVE = ("asyncio", "dspy", "httpcore", "httpx", "openai", "urllib3")
# These log each call, what they say is in the error of the call, and their own handler would quote it.
_SILENT = ("LiteLLM", "LiteLLM Proxy", "LiteLLM Router")


def setup(level: str, send: SendRecord | None) -> None:
    """Send records to stderr, or as frames through `send`, which may wait. Later calls change nothing."""
    root = logging.getLogger()
    if any(isinstance(handler.formatter, _Redacted) for handler in root.handlers):
        return
    handler = _Queued(send or _to_stderr)
    line = f"dspy_bridge[{os.getpid()}] %(levelname)s %(name)s%(of_trace)s: %(message)s"
    handler.setFormatter(_Redacted(line if send is None else "%(message)s"))
    # Also the handler: dspy's logger has a level of its own.
    handler.setLevel(level.upper())
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.INFO, root.level))
    for name in _SILENT:
        logging.getLogger(name).disabled = True
    logging.captureWarnings(True)


def adopt(name: str) -> None:
    """Send the records of a library that has a handler of its own through ours."""
    library = logging.getLogger(name)
    library.handlers.clear()
    library.propagate = True


# Their records may quote what they work on.
_QUOTING = ("dspy", "litellm")
# Only the first line is fixed: pydantic's warnings and asyncio's errors quote values after it.
_FIRST_LINE = ("py.warnings", "asyncio")


def without_contents(record: logging.LogRecord) -> logging.LogRecord:
    """The record, or a copy without contents. Records of user code are kept as they are."""
    first_line = record.name in _FIRST_LINE
    folders = [os.path.dirname(sys.modules[name].__file__ or "") + os.sep for name in _QUOTING if name in sys.modules]
    library = not first_line and record.pathname.startswith(tuple(folders))
    if not (first_line or library or record.name == "dspy_bridge"):
        return record
    cleaned = copy.copy(record)
    if first_line:
        cleaned.msg, cleaned.args = record.getMessage().partition("\n")[0], ()
    elif library:
        cleaned.msg, cleaned.args = f"text withheld, {record.module}.py line {record.lineno}", ()
    if record.exc_info and record.exc_info[1] is not None:
        cleaned.exc_text = _traceback(record.exc_info[1])
    return cleaned


def _traceback(error: BaseException) -> str:
    """The tracebacks of `error` and its causes, without their texts."""
    parts: list[str] = []
    seen: set[int] = set()
    left: BaseException | None = error
    while left is not None and id(left) not in seen:
        seen.add(id(left))
        frames = "".join(traceback.format_tb(left.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(left).__name__}")
        left = left.__cause__ or (None if left.__suppress_context__ else left.__context__)
    return "\n\nwhich led to:\n\n".join(reversed(parts))


# While they optimize they print and log progress bars, prompts and answers, thousands of lines.
_OPTIMIZING = ("dspy", "gepa", "optuna", "py.warnings")


class _Stream:
    """`sys.stdout` or `sys.stderr`, whose writes are dropped where `dropped()`."""

    def __init__(self, stream: Any, dropped: Callable[[], bool]) -> None:
        self._stream = stream
        self._dropped = dropped

    def write(self, text: str) -> int:
        return len(text) if self._dropped() else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def drop_where(dropped: Callable[[], bool]) -> None:
    """Drop from now on what such libraries print and log in threads for which `dropped()` is true at the time."""
    if isinstance(sys.stderr, _Stream):
        return
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            setattr(sys, name, _Stream(stream, dropped))
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not (record.name.startswith(_OPTIMIZING) and dropped()))
