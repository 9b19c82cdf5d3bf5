"""The LM calls of one run as `meta["history"]` shows them: JSON within a limit, without secrets. Imports no DSPy.

Each call is encoded when it has ended, so that prompts are not kept longer than they are needed.
"""

from __future__ import annotations

import itertools
import re
import threading
from typing import Any

import jiter

from dspy_bridge.logs import redaction
from dspy_bridge.wire.json_values import encode_value

# Text as long as this without a break is data, such as an image in base64.
_SHORTEST_DATA = 256
_DATA = re.compile(rf"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{{{_SHORTEST_DATA},}}={{0,2}}")
# Values that are nested deeper are left out.
_MAX_DEPTH = 64
# The longest of a history that has no calls.
_OMITTED = b'[{"omitted":1000000}]'


class _TooLong(Exception):
    """There is more text than the whole history may have."""


class History:
    """The LM calls of one run, of at most `most` bytes; calls may end in any order, on any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        # JSON by the number of the call, in the order in which the calls ended, which is that in which they go.
        self._calls: dict[int, bytes] = {}
        self._omitted = 0
        self._size = len(_OMITTED)

    def begin(self) -> int:
        return next(self._numbers)

    def end(self, number: int, messages: Any, about: dict[str, Any]) -> None:
        """The contents of a call: what the LM was sent, and all else. The first time counts."""
        call = self._encoded({**about, "messages": messages}) or self._encoded({**about, "messages": None})
        with self._lock:
            if number in self._calls:
                return
            # Longer than the limit, so that it goes at once.
            self._calls[number] = call or b" " * self._most
            self._size += len(self._calls[number]) + 1
            while self._size > self._most and self._calls:
                self._size -= len(self._calls.pop(next(iter(self._calls)))) + 1
                self._omitted += 1

    def json(self) -> bytes:
        """A JSON list, the call that started first at its head; without those that have not ended.

        If calls had to go its first element is `{"omitted": how many}`.
        """
        with self._lock:
            parts = [call for _, call in sorted(self._calls.items())]
            if self._omitted:
                parts.insert(0, b'{"omitted":%d}' % self._omitted)
        return b"[" + b",".join(parts) + b"]"

    def _encoded(self, call: dict[str, Any]) -> bytes | None:
        """None if it is too long."""
        try:
            shown = encode_value(_Shown(self._most).of(call))
        except _TooLong:
            return None
        return shown if len(shown) + len(_OMITTED) < self._most else None


class _Shown:
    """Plain copies of values, without secrets, and with data cut short."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most

    def of(self, value: Any, depth: int = 0) -> Any:
        """Raises `_TooLong`."""
        if isinstance(value, str):
            return self._text(value)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if depth > _MAX_DEPTH:
            return "…"
        if isinstance(value, dict):
            return {self._text(str(name)): self.of(inner, depth + 1) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(inner, depth + 1) for inner in value]
        # Objects of DSPy's, LiteLLM's and the user's: their fields.
        return self.of(jiter.from_json(encode_value(value)), depth + 1)

    def _text(self, text: str) -> str:
        if len(text) > self._most:
            # With an image in it, which takes long to search for secrets.
            text = _without_data(text)
        self._left -= len(text)
        if self._left < 0:
            raise _TooLong
        # In this order: half a secret is not known as one.
        return _without_data(redaction.redact(text))


def _without_data(text: str) -> str:
    return _DATA.sub(lambda found: f"…({len(found[0])} characters)", text)
