"""An answer in JSON read as it comes, by a parser that stops wherever the next piece is needed. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Iterator

from dspy_bridge.streaming.field_parsers import Reader, Told

# What must stand after a backslash; what could still become that.
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_BEGUN_ESCAPE = re.compile(r"(?:\\(?:u[0-9a-fA-F]{0,3})?)?")
# Characters past 16 bits are two escapes.
_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HIGH = re.compile(r"\\u[dD][89abAB]")
_PLAIN = re.compile(r'[^"\\]+')
# Within an object or a list nobody wants to hear of.
_DEEP = re.compile(r'[^"{}\[\]]*')
_SPACE = " \t\r\n"


class _Unreadable(Exception):
    """This is no JSON; DSPy may find something in it at the end."""


class JSONReader(Reader):
    """The texts among the values of the first object: as `dspy.JSONAdapter` reads what is JSON."""

    def __init__(self, fields: Iterable[str]) -> None:
        super().__init__(fields)
        self._buffer = ""
        self._at = 0
        # A parser that gives None wherever it needs more.
        self._parts: Iterator[Told | None] = self._read()
        self._over = False

    def feed(self, piece: str) -> Iterator[Told]:
        """As `Reader`'s."""
        if self._over:
            return
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        told: dict[str, list[str]] = {}
        try:
            for part in self._parts:
                if part is None:
                    break
                told.setdefault(part[0], []).append(part[1])
            else:
                self._over = True
        except _Unreadable:
            self._over = True
        yield from ((field, "".join(texts)) for field, texts in told.items())

    def _read(self) -> Iterator[Told | None]:
        while (yield from self._next()) != "{":
            self._at += 1
        self._at += 1
        seen = set()
        while (yield from self._next(_SPACE + ",")) != "}":
            key: list[str] = []
            for part in self._string():
                if part is None:
                    yield None
                else:
                    key.append(part)
            name = "".join(key)
            if (yield from self._next(_SPACE)) != ":":
                raise _Unreadable
            self._at += 1
            if (yield from self._next(_SPACE)) == '"':
                wanted = name in self.fields and name not in seen
                for part in self._string():
                    if part is None:
                        yield None
                    elif wanted:
                        yield name, part
            else:
                yield from self._skip_value()
            seen.add(name)

    def _next(self, skipped: str = "") -> Generator[None, None, str]:
        """The next character that is not to be skipped; it stays where it is."""
        while True:
            while self._at == len(self._buffer):
                yield None
            if self._buffer[self._at] not in skipped:
                return self._buffer[self._at]
            self._at += 1

    def _string(self) -> Iterator[str | None]:
        """The text of a string in parts, from its first quote to past its last."""
        if self._buffer[self._at] != '"':
            raise _Unreadable
        self._at += 1
        while (yield from self._next()) != '"':
            plain = _PLAIN.match(self._buffer, self._at)
            if plain is None:
                yield from self._escape()
            else:
                self._at = plain.end()
                yield plain[0]
        self._at += 1

    def _escape(self) -> Iterator[str | None]:
        while True:
            ahead = self._buffer[self._at : self._at + 12]
            escape = _PAIR.match(ahead) or _ESCAPE.match(ahead)
            undecided = ahead if escape is None else ahead[6:] if len(escape[0]) == 6 and _HIGH.match(ahead) else "."
            if _BEGUN_ESCAPE.fullmatch(undecided):
                yield None
            elif escape is None:
                raise _Unreadable
            else:
                self._at += len(escape[0])
                yield json.loads(f'"{escape[0]}"')
                return

    def _skip_value(self) -> Iterator[None]:
        """Past a value that is no string, to the comma or brace after it."""
        depth = 0
        while True:
            here = yield from self._next()
            if depth == 0 and here in ",}":
                return
            if here == '"':
                for part in self._string():
                    if part is None:
                        yield None
                continue
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(here, 0)
            other = _DEEP.match(self._buffer, self._at + 1)
            self._at = other.end() if other and depth > 0 else self._at + 1
