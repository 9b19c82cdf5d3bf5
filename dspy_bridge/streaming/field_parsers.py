"""An LM's answer read as it comes: which of its fields goes on with which text. Pure; a reader for each format.

DSPy's own `StreamListener` gives escapes of JSON and entities of XML as they are written, and loses text around `[[`
and quotes. Here the texts of a field, joined, are the text that DSPy's parser gives for it at the end. Where that
cannot be (DSPy repairs what is no JSON, for one), a reader falls silent: what it has told is the beginning of the
field, as a rule, and the rest is told at the end (`rest`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from xml.parsers import expat

Told = tuple[str, str]


def rest(told: str, whole: str) -> str:
    """What of a field is still to be told; nothing if something else was told."""
    return whole[len(told) :] if whole.startswith(told) else ""


class _Stripped:
    """A text without the white space around it: that at its end is held until more follows."""

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
        """The white space that is held is no part of the text."""
        self._held = []


class Reader:
    """Reads one answer for `fields`."""

    def __init__(self, fields: Iterable[str]) -> None:
        self.fields = frozenset(fields)

    def feed(self, piece: str) -> Iterator[Told]:
        """The texts of fields that end in this piece, or begin in it, or are all of it."""
        raise NotImplementedError


# A field's header stands at the beginning of a line; what could still become one.
_HEADER = re.compile(r"\[\[ ## (\w+) ## \]\]")
_PARTS = (r"\[", r"\[", " ", "#", "#", " ", r"\w{1,200}", " ", "#", "#", " ", r"\]", r"\]")
_BEGUN_HEADER = re.compile("".join(f"(?:{part}" for part in _PARTS) + ")?" * len(_PARTS))


class ChatReader(Reader):
    """`[[ ## field ## ]]`, the text, and so on: as `dspy.ChatAdapter` reads it, line by line."""

    def __init__(self, fields: Iterable[str]) -> None:
        super().__init__(fields)
        self._seen: set[str] = set()
        self._field: str | None = None
        self._text = _Stripped()
        # The line so far without the white space before it, as long as it may be a header; None once it is text.
        self._line: str | None = ""
        self._indent = 0
        self._after_header = False
        # A carriage return, which may be half a line break.
        self._half = ""

    def feed(self, piece: str) -> Iterator[Told]:
        """As `Reader`'s."""
        piece = self._half + piece
        self._half = "\r" if piece.endswith("\r") else ""
        for part in piece[: len(piece) - len(self._half)].splitlines(keepends=True):
            line = part.splitlines()[0]
            yield from self._add(line)
            if len(line) < len(part):
                yield from self._end_line()

    def _add(self, part: str) -> Iterator[Told]:
        if self._line is None:
            yield from self._tell(part)
            return
        if not self._line:
            # Of white space nothing shows unless text follows, so there is nothing to wait for.
            text = part.lstrip()
            space = len(part) - len(text)
            self._indent += space
            yield from self._tell(part[:space])
            part = text
        self._line += part
        header = _HEADER.match(self._line)
        if header is not None:
            self._begin(header[1])
            # With spaces before the header DSPy cuts as many characters too early.
            part, self._line, self._after_header = self._line[max(0, header.end() - self._indent) :], None, True
            yield from self._tell(part)
        elif not _BEGUN_HEADER.fullmatch(self._line):
            part, self._line = self._line, None
            yield from self._tell(part)

    def _begin(self, field: str) -> None:
        # Of a field that comes twice the first counts.
        self._field = field if field in self.fields and field not in self._seen else None
        self._seen.add(field)
        self._text = _Stripped()

    def _end_line(self) -> Iterator[Told]:
        if self._line:
            yield from self._tell(self._line)
        if self._after_header:
            self._text.trim()
        self._line, self._indent, self._after_header = "", 0, False
        # Whatever broke the line.
        yield from self._tell("\n")

    def _tell(self, text: str) -> Iterator[Told]:
        if self._field is not None and (visible := self._text.add(text)):
            yield self._field, visible


# The parser looks at an unfinished tag from its beginning with each piece. Longer ones (in bytes) are no field's.
_LONGEST_TAG = 1000


class XMLReader(Reader):
    """`<field>text</field>` and so on: with the parser that `dspy.XMLAdapter` uses."""

    def __init__(self, fields: Iterable[str]) -> None:
        super().__init__(fields)
        self._seen: set[str] = set()
        self._field: str | None = None
        self._text = _Stripped()
        self._depth = 0
        self._told: list[Told] = []
        parser = expat.ParserCreate("utf-8")
        if hasattr(parser, "SetReparseDeferralEnabled"):
            parser.SetReparseDeferralEnabled(False)  # it would hold text back
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        self._parser: expat.XMLParserType | None = parser
        parser.Parse(b"<all>", False)
        self._fed = len(b"<all>")

    def feed(self, piece: str) -> Iterator[Told]:
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
        told, self._told = self._told, []
        texts: dict[str, list[str]] = {}
        for field, text in told:
            texts.setdefault(field, []).append(text)
        yield from ((field, "".join(parts)) for field, parts in texts.items())

    def _start(self, name: str, _attributes: dict[str, str]) -> None:
        self._depth += 1
        # An element within a field becomes part of its text, in a form that is known at the end.
        self._field = name if self._depth == 2 and name in self.fields and name not in self._seen else None
        if self._depth == 2:
            self._seen.add(name)
            self._text = _Stripped()

    def _end(self, _name: str) -> None:
        self._depth -= 1
        self._field = None

    def _characters(self, text: str) -> None:
        if self._field is not None and (visible := self._text.add(text)):
            self._told.append((self._field, visible))
