"""Streaming parsers of an LM's answer, one for each format: they split it into chunks of fields. Pure.

DSPy's own `StreamListener` does not decode JSON escapes and XML entities, and loses text around `[[` and quotes. Here
the chunks of a field, joined, are the value that DSPy's parser returns at the end. Where that is impossible (DSPy
repairs invalid JSON, for example) a parser stops: usually it has emitted the beginning of the field, and the rest is
sent at the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any
from xml.parsers import expat

import jiter

# A field and its next characters.
Chunk = tuple[str, str]


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


# A field's header, at the beginning of a line, and an unfinished one.
_HEADER = re.compile(r"(\s{0,200})\[\[ ## (\w+) ## \]\]")
_PARTS = (r"\[", r"\[", " ", "#", "#", " ", r"\w{1,200}", " ", "#", "#", " ", r"\]", r"\]")
_BEGUN_HEADER = re.compile(r"\s{0,200}" + "".join(f"(?:{part}" for part in _PARTS) + ")?" * len(_PARTS))


class ChatReader:
    """Parses `[[ ## field ## ]]` headers and values line by line, like `dspy.ChatAdapter`."""

    def __init__(self, fields: Iterable[str]) -> None:
        self._fields = frozenset(fields)
        self._seen: set[str] = set()
        self._field: str | None = None
        self._text = _Stripped()
        # The line so far, while it may be a header; then None.
        self._line: str | None = ""
        self._after_header = False
        # A carriage return, possibly the first half of a line break.
        self._half = ""

    def feed(self, piece: str) -> Iterator[Chunk]:
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
                self._field = header[2] if header[2] in self._fields - self._seen else None
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


class XMLReader:
    """Parses `<field>value</field>` elements with expat, like `dspy.XMLAdapter`."""

    def __init__(self, fields: Iterable[str]) -> None:
        self._fields = frozenset(fields)
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
        self._field = name if self._depth == 2 and name in self._fields and name not in self._seen else None
        if self._depth == 2:
            self._seen.add(name)
            self._text = _Stripped()

    def _end(self, _name: str) -> None:
        self._depth -= 1
        self._field = None

    def _characters(self, text: str) -> None:
        if self._field is not None and (visible := self._text.add(text)):
            self._chunks.append((self._field, visible))


# In bytes: each piece is parsed with all before it, which takes 35 µs at half of this.
_MOST_JSON = 64 * 1024


class JSONReader:
    """Reads the string values of the first object, as `dspy.JSONAdapter` does when the answer is valid JSON."""

    def __init__(self, fields: Iterable[str]) -> None:
        self._fields = frozenset(fields)
        # None after an error: DSPy may find something in the answer at the end.
        self._answer: bytes | None = b""
        self._sent = dict.fromkeys(self._fields, 0)

    def feed(self, piece: str) -> Iterator[Chunk]:
        if self._answer is None:
            return
        try:
            self._answer += piece.encode()
            if (begin := self._answer.find(b"{")) < 0:
                return
            self._answer = self._answer[begin:]
            values = jiter.from_json(self._answer, partial_mode="trailing-strings", catch_duplicate_keys=True)
        except ValueError:
            self._answer = None
            return
        if len(self._answer) > _MOST_JSON:
            self._answer = None
        for field, value in self._find(values).items():
            if field in self._fields and isinstance(value, str) and len(value) > self._sent[field]:
                yield field, value[self._sent[field] :]
                self._sent[field] = len(value)

    def _find(self, values: dict[str, Any]) -> dict[str, Any]:
        """The fields in what was read so far."""
        return values


class _CallsReader(JSONReader):
    """Reads the arguments of the first call of `submit` in JSON that `dspy.ToolCalls` accepts."""

    def _find(self, values: dict[str, Any]) -> dict[str, Any]:
        calls: Any = values
        while isinstance(calls, dict) and "tool_calls" in calls:
            calls = calls["tool_calls"]
        for call in calls if isinstance(calls, list) else [calls]:
            args = call.get("args") if isinstance(call, dict) and call.get("name") == "submit" else None
            # A name that comes last may be the beginning of a longer one.
            if isinstance(args, dict) and [*call].index("name") < [*call].index("args"):
                return args
        return {}


class SubmitReader:
    """The outputs of an agent that ends by a call of the tool `submit`: in the field `tool_calls`, or a native call."""

    def __init__(self, fields: Iterable[str], text: type[ChatReader] | type[XMLReader] | type[JSONReader]) -> None:
        """`text`: the reader of the adapter's format."""
        self._fields = frozenset(fields)
        self._text = None if text is JSONReader else text(["tool_calls"])
        self._calls = _CallsReader(self._fields)
        # Native calls, by their index: the reader of the arguments of the first `submit`, None for others.
        self._native: dict[int, JSONReader | None] = {}

    def feed(self, piece: str) -> Iterator[Chunk]:
        if self._text is not None:
            piece = "".join(text for _, text in self._text.feed(piece))
        return self._calls.feed(piece)

    def native(self, index: int, name: str | None, arguments: str | None) -> Iterator[Chunk]:
        """The next piece of a native call."""
        if index not in self._native:
            first = name == "submit" and not any(self._native.values())
            self._native[index] = JSONReader(self._fields) if first else None
        reader = self._native[index]
        return iter(()) if reader is None else reader.feed(arguments or "")


Reader = ChatReader | XMLReader | JSONReader
