"""A streaming parser of an LM's answer in JSON. Pure.

`jiter` reads unfinished JSON too, but each time from the beginning, and of JSON with an error in it nothing: what is
sent would depend on how the answer comes in pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Iterator

from dspy_bridge.streaming.field_parsers import Chunk, Reader

_HIGH, _LOW = r"[dD][89abAB][0-9a-fA-F]{2}", r"[dD][c-fC-F][0-9a-fA-F]{2}"
# Characters and whole escapes of a string. A surrogate pair is matched as one, half of one only when it is known what
# follows. As many as `re` takes little memory for: 120 bytes each.
_TEXT = re.compile(
    rf'(?:[^"\\]+|\\["\\/bfnrt]|\\u(?!{_HIGH})[0-9a-fA-F]{{4}}|\\u{_HIGH}\\u{_LOW}'
    rf"|\\u{_HIGH}(?=[^\\]|\\[^u]|\\u(?!{_LOW}).{{4}})){{1,10000}}",
    re.DOTALL,
)
# What may still become an escape.
_UNFINISHED = re.compile(rf"(?:\\(?:u[0-9a-fA-F]{{0,3}}|u{_HIGH}(?:\\(?:u.{{0,3}})?)?)?)?", re.DOTALL)
_NESTED = re.compile(r'[^"{}\[\]]*')
_SPACE = " \t\r\n"


class JSONReader(Reader):
    """Reads the string values of the first object, as `dspy.JSONAdapter` does when the answer is valid JSON."""

    def __init__(self, fields: Iterable[str]) -> None:
        super().__init__(fields)
        self._buffer = ""
        self._at = 0
        # Gives None wherever it needs more of the answer. Gone after the object, and after an error: DSPy may find
        # something in the answer at the end.
        self._parts: Iterator[Chunk | None] | None = self._read()

    def feed(self, piece: str) -> Iterator[Chunk]:
        """As `Reader`'s."""
        if self._parts is None:
            return
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        try:
            for part in self._parts:
                if part is None:
                    return
                yield part
        except ValueError:
            pass
        self._parts = None

    def _read(self) -> Iterator[Chunk | None]:
        while (yield from self._next()) != "{":
            self._at += 1
        self._at += 1
        seen = set()
        while (yield from self._next(_SPACE + ",")) != "}":
            name = yield from self._string()
            if (yield from self._next(_SPACE)) != ":":
                raise ValueError
            self._at += 1
            if (yield from self._next(_SPACE)) == '"':
                yield from self._string(name if name in self.fields and name not in seen else None)
            else:
                yield from self._skip_value()
            seen.add(name)

    def _next(self, skipped: str = "") -> Generator[None, None, str]:
        """The next character after those that are skipped; it stays unread."""
        while True:
            while self._at == len(self._buffer):
                yield None
            if self._buffer[self._at] not in skipped:
                return self._buffer[self._at]
            self._at += 1

    def _string(self, field: str | None = None) -> Generator[Chunk | None, None, str]:
        """Reads a string, quotes included: gives its parts as those of `field`, else returns it."""
        if self._buffer[self._at] != '"':
            raise ValueError
        self._at += 1
        whole = ""
        while not self._buffer.startswith('"', self._at):
            if text := _TEXT.match(self._buffer, self._at):
                self._at = text.end()
                part = json.loads(f'"{text[0]}"', strict=False)
                if field is None:
                    whole += part
                else:
                    yield field, part
            elif _UNFINISHED.fullmatch(self._buffer, self._at):
                yield None
            else:
                raise ValueError
        self._at += 1
        return whole

    def _skip_value(self) -> Iterator[Chunk | None]:
        """Past a value that is not a string, to the comma or brace after it."""
        depth = 0
        while True:
            here = yield from self._next()
            if depth == 0 and here in ",}":
                return
            if here == '"':
                yield from self._string()
                continue
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(here, 0)
            other = _NESTED.match(self._buffer, self._at + 1)
            self._at = other.end() if other and depth > 0 else self._at + 1
