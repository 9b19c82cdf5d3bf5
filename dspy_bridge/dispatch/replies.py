"""Results and exceptions to reply payloads, counted per command. Any thread may use it.

Here, and nowhere else, do exceptions become errors of the protocol.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from dspy_bridge import logs
from dspy_bridge.errors import BridgeError, FrameTooLarge
from dspy_bridge.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from dspy_bridge.dispatch.call import Call

# Quantiles are those of the last thousand calls: 8 KB for each command, sorted in 0.1 ms on request.
WINDOW = 1000
# An error's text is one line of at most this many characters.
MAX_ERROR_CHARS = 2000
# Before it is cut to that it is redacted, and before that cut to this: half a secret is not known as one.
_MOST_REDACTED = 10 * MAX_ERROR_CHARS


def describe(error: BaseException) -> dict[str, Any]:
    """`{"success": False, "error", "error_type"}`, of an exception."""
    if isinstance(error, BridgeError):
        text = str(error)
        return messages.failure(error.error_type, text if error.exact else redacted(text), error.retryable)
    # A defect, ours or of user code. Its text may hold contents, so it goes to the log alone.
    text = f"{type(error).__name__} in the peer; its log has the traceback under {logs.exception(error)}"
    return messages.failure("internal", text)


def one_line(text: str, most: int = MAX_ERROR_CHARS) -> str:
    """`text` without line breaks, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def redacted(text: str) -> str:
    """`text` in one line, without secrets."""
    # The first ping would wait for its expressions.
    from dspy_bridge.logs import redaction

    return one_line(redaction.redact(one_line(text, _MOST_REDACTED)))


class CommandStats:
    """Counts of one command since start; quantiles over its last `WINDOW` calls."""

    def __init__(self) -> None:
        self.count = self.errors = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float, failed: bool = False, count: int = 1) -> None:
        """Count `count` calls that took `seconds` from receipt to reply."""
        self.count += count
        self.errors += failed
        self._recent.extend([seconds] * count)

    def summary(self) -> dict[str, int | float]:
        """`{"count", "errors", "p50_ms", "p99_ms"}`, times in ms."""
        ordered = sorted(self._recent)
        # The nearest rank. Rounded up without `math`, whose import the first ping would wait for.
        p50, p99 = (round(ordered[-int(-share * len(ordered) // 1) - 1] * 1000, 3) for share in (0.5, 0.99))
        return {"count": self.count, "errors": self.errors, "p50_ms": p50, "p99_ms": p99}


class ReplyEncoder:
    """Encodes replies of at most `max_bytes`."""

    def __init__(self, commands: Iterable[str], max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # Public for pings that are answered before they become calls, on the reading thread.
        self.pings = CommandStats()
        self._stats = {name: CommandStats() for name in commands} | {"ping": self.pings}
        self._lock = threading.Lock()

    def encode(self, call: Call, result: Any, error: BaseException | None) -> bytes:
        """The reply to `call`, as a payload. Calls `call.on_reply` with whether it is a success, before it is sent."""
        now = time.monotonic()
        meta = _meta(call, now) if call.request.meta else None
        if call.accounts:
            meta = {**(meta or {}), **{name: shown() for name, shown in call.accounts.items()}}
        payload = b""
        if error is None:
            try:
                payload = self._fitting(meta, lambda meta: messages.encode_result(call.id, result, meta))
                if len(payload) > self._max_bytes:
                    raise FrameTooLarge(f"the reply has {len(payload)} bytes: expected at most {self._max_bytes}")
            except BaseException as raised:  # encoding a value may run code of its own
                error = raised
        if call.on_reply is not None:
            call.on_reply(error is None)
        if error is not None:
            failure = describe(error)
            payload = self._fitting(meta, lambda meta: messages.encode_failure(call.id, failure, meta))
            if len(payload) > self._max_bytes:
                # The limit is a few hundred bytes, or an id or a name fills it.
                failure = messages.failure(FrameTooLarge.error_type, "the error is too long for a frame")
                payload = messages.encode_failure(call.id, failure)
        stats = self._stats.get(call.request.command)
        if stats is not None:
            with self._lock:
                stats.add(now - call.received, error is not None)
        return payload

    def summaries(self) -> dict[str, dict[str, int | float]]:
        """The statistics of each command that was called."""
        with self._lock:
            return {name: stats.summary() for name, stats in self._stats.items() if stats.count}

    def _fitting(self, meta: dict[str, Any] | None, encode: Callable[[dict[str, Any] | None], bytes]) -> bytes:
        """A payload with meta; if it is too long, with its lists of LM calls left out, the longest first."""
        payload = encode(meta)
        for name in ("history", "lm_events"):
            if meta is not None and len(payload) > self._max_bytes and meta.get(name):
                meta = {**meta, name: [{"omitted": meta["lm_calls"]}] if name == "history" else []}
                payload = encode(meta)
        return payload


def _meta(call: Call, now: float) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "duration_ms": round((now - call.received) * 1000, 3),
        # All of its time was waiting, if it has never started.
        "queue_ms": round(((now if call.started is None else call.started) - call.received) * 1000, 3),
        "wait_ms": 0.0,
        "lm_usage": {},
        "lm_calls": 0,
        "cache_hits": 0,
        "finish_reasons": [],
        "fallbacks": 0,
        "cost_usd": 0.0,
        **{name: [] for name in ("history", "lm_events") if getattr(call.request, name)},
    }
    if call.meter is not None:
        try:
            meta.update(call.meter.summary())
        except Exception:  # an LM of the user's may report anything as its usage
            pass
    return meta
