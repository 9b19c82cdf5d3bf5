"""Streaming parsers of an LM's answer, one for each format: they split it into chunks of fields. Pure.

DSPy's own `StreamListener` does not decode JSON escapes and XML entities, and loses text around `[[` and quotes. Here
the chunks of a field, joined, are the value that DSPy's parser returns at the end. Where that is impossible (DSPy
repairs invalid JSON, for example) a parser stops: usually it has emitted the beginning of the field, and the rest is
sent at the end (`rest`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Iterator
from xml.parsers import expat

# A field and its next characters.
Chunk = tuple[str, str]


def rest(sent: str, whole: str) -> str:
    """The unsent rest of a field; empty if something else was sent."""
    return whole[len(sent) :] if whole.startswith(sent) else ""


class _Stripped:
    """Strips white space at both ends of a string: at the end it is held back until more follows."""

    def __init__(self) -> None:
        self._begun = False
        self._held: list[str] = []

    def add(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
        if not text.strip():
            self._held.append(text)
            return ""
        self._begun = True
        text = "".join((*self._held, text))
        visible = text.rstrip()
        self._held = [text[len(visible) :]]
        return visible

    def trim(self) -> None:
        """Drop the white space that is held back."""
        self._held = []


class Reader:
    """Parses one answer for `fields`."""

    def __init__(self, fields: Iterable[str]) -> None:
        self.fields = frozenset(fields)

    def feed(self, piece: str) -> Iterator[Chunk]:
        """The chunks that are complete with this piece of the answer."""
        raise NotImplementedError


# A field's header, at the beginning of a line, and an unfinished one.
_HEADER = re.compile(r"(\s{0,200})\[\[ ## (\w+) ## \]\]")
_PARTS = (r"\[", r"\[", " ", "#", "#", " ", r"\w{1,200}", " ", "#", "#", " ", r"\]", r"\]")
_BEGUN_HEADER = re.compile(r"\s{0,200}" + "".join(f"(?:{part}" for part in _PARTS) + ")?" * len(_PARTS))


class ChatReader(Reader):
    """Parses `[[ ## field ## ]]` headers and values line by line, like `dspy.ChatAdapter`."""

    def __init__(self, fields: Iterable[str]) -> None:
        super().__init__(fields)
        self._seen: set[str] = set()
        self._field: str | None = None
        self._text = _Stripped()
        # The line so far, while it may be a header; then None.
        self._line: str | None = ""
        self._after_header = False
        # A carriage return, possibly the first half of a line break.
        self._half = ""

    def feed(self, piece: str) -> Iterator[Chunk]:
        """As `Reader`'s."""
        piece = self._half + piece
        self._half = "\r" if piece.endswith("\r") else ""
        for part in piece[: len(piece) - len(self._half)].splitlines(keepends=True):
            line = part.splitlines()[0]
            yield from self._add(line, ended=len(line) < len(part))

    def _add(self, text: str, *, ended: bool) -> Iterator[Chunk]:
        if self._line is not None:
            text = self._line + text
            header = _HEADER.match(text)
            if header is not None:
                # The first occurrence of a field counts.
                self._field = header[2] if header[2] in self.fields - self._seen else None
                self._seen.add(header[2])
                self._text = _Stripped()
                # With spaces before the header DSPy cuts the line as many characters too early.
                text, self._line, self._after_header = text[header.end() - len(header[1]) :], None, True
            elif not ended and _BEGUN_HEADER.fullmatch(text):
                self._line = text
                return
            else:
                self._line = None
        yield from self._emit(text)
        if ended:
            if self._after_header:
                self._text.trim()
            self._line, self._after_header = "", False
            # DSPy joins lines with this, whatever separated them.
            yield from self._emit("\n")

    def _emit(self, text: str) -> Iterator[Chunk]:
        if self._field is not None and (visible := self._text.add(text)):
            yield self._field, visible


# In bytes. Expat parses an unfinished tag from its beginning with each piece; no field's tag is longer.
_LONGEST_TAG = 1000


class XMLReader(Reader):
    """Parses `<field>value</field>` elements with expat, like `dspy.XMLAdapter`."""

    def __init__(self, fields: Iterable[str]) -> None:
        super().__init__(fields)
        self._seen: set[str] = set()
        self._field: str | None = None
        self._text = _Stripped()
        self._depth = 0
        self._chunks: list[Chunk] = []
        parser = expat.ParserCreate("utf-8")
        if hasattr(parser, "SetReparseDeferralEnabled"):
            parser.SetReparseDeferralEnabled(False)  # it holds text back
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        self._parser: expat.XMLParserType | None = parser
        parser.Parse(b"<all>", False)
        self._fed = len(b"<all>")

    def feed(self, piece: str) -> Iterator[Chunk]:
        """As `Reader`'s."""
        if self._parser is not None:
            try:
                data = piece.encode()
                self._parser.Parse(data, False)
            except (expat.ExpatError, UnicodeEncodeError):
                self._parser = None
            else:
                self._fed += len(data)
                if self._fed - self._parser.CurrentByteIndex > _LONGEST_TAG:
                    self._parser = None
        chunks, self._chunks = self._chunks, []
        texts: dict[str, list[str]] = {}
        for field, text in chunks:
            texts.setdefault(field, []).append(text)
        yield from ((field, "".join(parts)) for field, parts in texts.items())

    def _start(self, name: str, _attributes: dict[str, str]) -> None:
        self._depth += 1
        # The value of a field with an element in it is only known at the end.
        self._field = name if self._depth == 2 and name in self.fields and name not in self._seen else None
        if self._depth == 2:
            self._seen.add(name)
            self._text = _Stripped()

    def _end(self, _name: str) -> None:
        self._depth -= 1
        self._field = None

    def _characters(self, text: str) -> None:
        if self._field is not None and (visible := self._text.add(text)):
            self._chunks.append((self._field, visible))


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
    """Reads the string values of the first object, as `dspy.JSONAdapter` does when the answer is valid JSON.

    `jiter` reads unfinished JSON too, but each time from the beginning, and of JSON with an error in it nothing: what
    is sent would depend on how the answer comes in pieces.
    """

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
