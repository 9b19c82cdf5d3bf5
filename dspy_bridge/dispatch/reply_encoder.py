"""Results and exceptions to reply payloads, counted per command. Any thread may use it."""

from __future__ import annotations

import threading
import time

from dspy_bridge.dispatch import error_replies
from dspy_bridge.dispatch.latency import CommandStats
from dspy_bridge.errors import FrameTooLarge
from dspy_bridge.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from dspy_bridge.dispatch.call import Call


class ReplyEncoder:
    """Encodes replies of at most `max_bytes`; `log_exception` is as for `error_replies.describe`."""

    def __init__(self, commands: Iterable[str], max_bytes: int, log_exception: Callable[[BaseException], str]) -> None:
        self._max_bytes = max_bytes
        self._log_exception = log_exception
        # Public for pings that are answered before they become calls, on the reading thread.
        self.pings = CommandStats()
        self._stats = {name: CommandStats() for name in commands} | {"ping": self.pings}
        self._lock = threading.Lock()

    def encode(self, call: Call, result: Any, error: BaseException | None) -> bytes:
        """The reply to `call`, as a payload. Calls `call.on_reply` with whether it is a success, before it is sent."""
        now = time.monotonic()
        meta = _meta(call, now) if call.request.meta else None
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
            payload = self._encode_error(call.id, error, meta)
        stats = self._stats.get(call.request.command)
        if stats is not None:
            with self._lock:
                stats.add(now - call.received, error is not None)
        return payload

    def describe(self, error: BaseException) -> dict[str, Any]:
        """As `error_replies.describe`."""
        return error_replies.describe(error, self._log_exception)

    def summaries(self) -> dict[str, dict[str, int | float]]:
        """The statistics of each command that was called."""
        with self._lock:
            return {name: stats.summary() for name, stats in self._stats.items() if stats.count}

    def _encode_error(self, id: messages.Id, error: BaseException, meta: dict[str, Any] | None) -> bytes:
        failure = self.describe(error)
        payload = self._fitting(meta, lambda meta: messages.encode_failure(id, failure, meta))
        if len(payload) > self._max_bytes:
            # The limit is a few hundred bytes, or an id or a name fills it.
            text = "the error is too long for a frame"
            payload = messages.encode_failure(id, messages.failure(FrameTooLarge.error_type, text))
        return payload

    def _fitting(self, meta: dict[str, Any] | None, encode: Callable[[dict[str, Any] | None], bytes]) -> bytes:
        """A payload with meta; if it is too long, with its lists of LM calls left out, the longest first."""
        payload = encode(meta)
        if meta is not None and len(payload) > self._max_bytes and meta.get("history"):
            meta = {**meta, "history": [{"omitted": meta["lm_calls"]}]}
            payload = encode(meta)
        if meta is not None and len(payload) > self._max_bytes and meta.get("lm_events"):
            payload = encode({**meta, "lm_events": []})
        return payload


def _meta(call: Call, now: float) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "wait_ms": 0.0,
        "lm_usage": {},
        "lm_calls": 0,
        "cache_hits": 0,
        "finish_reasons": [],
        "fallbacks": 0,
        "cost_usd": 0.0,
    }
    for name, wanted in (("history", call.request.history), ("lm_events", call.request.lm_events)):
        if wanted:
            usage[name] = []
    if call.meter is not None:
        try:
            usage = call.meter.summary()
        except Exception:  # an LM of the user's may report anything as its usage
            pass
    return {
        "duration_ms": round((now - call.received) * 1000, 3),
        "queue_ms": round((call.started - call.received) * 1000, 3),
        **usage,
    }
