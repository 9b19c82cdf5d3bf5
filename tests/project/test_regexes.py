"""Every regular expression of the package takes linear time on strings that callers, LMs and tools may send.

Python's `re` tries every way to match before it gives up, with the GIL held: with a bad expression and a megabyte that
takes hours, in which the peer answers no request.
"""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dspy_bridge
from dspy_bridge.lm.adapters import field_markers
from dspy_bridge.lm.metering import history
from dspy_bridge.logs import redaction
from dspy_bridge.programs import remote_tools
from dspy_bridge.signatures import media, type_parser
from dspy_bridge.streaming import field_parsers
from dspy_bridge.wire import frames, messages

SOURCES = sorted(Path(dspy_bridge.__file__).parent.rglob("*.py"))
# The length of a string, and the CPU seconds that it may take: the slowest linear expression takes 0.01 s for it, a
# quadratic one half a second at 1 ns a step.
SIZE = 32_000
LIMIT = 0.4


def _words(text: str) -> None:
    re.findall(r"\s*\S+|\s+", text)


TRACE = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more"
PING = '{"id":12,"timeout_ms":5000,"command":"ping","args":{},"timestamp":"2026-01-01T00:00:00Z"}'
# Where it stands, by module and the name that it is assigned to or used in: what meets it there, and what it takes.
USES: dict[str, tuple[Callable[[str], Any], list[str]]] = {
    "field_markers:_HEADER": (field_markers.without_headers, ["[[ ## ab ## ]]"]),
    "field_markers:without_tags": (lambda text: field_markers.without_tags(text, {"ab"}), ["x</ab >", "<ab/>"]),
    "field_parsers:_HEADER": (lambda text: field_parsers._HEADER.match(text), ["[[ ## ab ## ]]"]),
    "field_parsers:_BEGUN_HEADER": (lambda text: field_parsers._BEGUN_HEADER.fullmatch(text), ["[[ ## ab ## ]]"]),
    "offline_lm:stream": (_words, ["ab  cd"]),
    "media:_URL": (lambda text: media._URL.fullmatch(text), ["https://ab/cd"]),
    "media:_DATA_HEAD": (lambda text: media._DATA_HEAD.fullmatch(text), ["data:a/b;c=d;e=f;base64"]),
    "media:_MIME": (lambda text: media._MIME.fullmatch(text), ["a/b"]),
    "messages:readable_id": (
        lambda text: messages.readable_id(text.encode()),
        [' { "id" : -12 ,', ' { "id" : "ab" }'],
    ),
    "messages:readable_call_id": (
        lambda text: messages.readable_call_id(text.encode()),
        [' { "tool_result" : { "call_id" : 12 ,'],
    ),
    "frames:_PING": (lambda text: frames.answer_pings(text.encode(), 0.0), ["\0\0\0Y" + PING, ("\0\0\0Y" + PING) * 2]),
    "type_parser:_LANGUAGE": (lambda text: type_parser._LANGUAGE.fullmatch(text), ["c++", "java"]),
    "messages:__init__": (lambda text: re.fullmatch(messages._TRACEPARENT, text), [TRACE]),
    "redaction:_SECRET_NAME": (redaction.names_secret, ["api_keys"]),
    "redaction:_USER": (lambda text: redaction._USER.sub("", text), ["https://ab:cd@ef"]),
    "redaction:_LOOKS_SECRET": (
        lambda text: redaction._LOOKS_SECRET.sub("", text),
        ["x sk-abcdef", "Bearer  abcdef", "AIzaabcdefghij"],
    ),
    "history:_DATA": (lambda text: history._DATA.sub("", text), ["ab cd", "a" * 255 + " b", "ab=="]),
    "type_parser:_STRING_OR_OTHER": (
        lambda text: type_parser._STRING_OR_OTHER.sub("", text),
        ["list<'a\\'b', \"c\">"],
    ),
    "remote_tools:_NAME": (lambda text: remote_tools._NAME.fullmatch(text), ["ab"]),
}
# Those that read what the peer itself has written.
OF_OUR_OWN = {"erlport:_HEAD"}


def uses(source: Path) -> set[str]:
    """Where a module uses `re`: module and the function, or the name that the expression gets."""
    found: set[str] = set()

    def visit(node: ast.AST, place: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            place = node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and place == "":
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            place = target.id if isinstance(target, ast.Name) else ""
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "re":
            found.add(f"{source.stem}:{place}")
        for child in ast.iter_child_nodes(node):
            visit(child, place)

    visit(ast.parse(source.read_text()), "")
    return found


def test_each_is_known_here() -> None:
    """A new expression is listed here, with the strings that it meets and their time."""
    assert set().union(*map(uses, SOURCES)) == USES.keys() | OF_OUR_OWN
    imported = [
        source.name for source in SOURCES if re.search(r"^\s*from re import|^\s*import regex", source.read_text(), re.M)
    ]
    assert not imported


@pytest.mark.parametrize("place", USES)
def test_no_text_takes_it_long(place: str) -> None:
    """Each character that it takes, and each two, again and again, and then something that it does not take."""
    meet, samples = USES[place]
    for sample in samples:
        meet(sample)
        for at in range(len(sample)):
            for unit in (sample[at], sample[at : at + 2], sample[: at + 1]):
                head = sample[:at] + unit * (SIZE // len(unit))
                for end in ("", " ", "\0", '"', "é"):
                    begun = time.process_time()
                    meet(head + end)
                    assert time.process_time() - begun < LIMIT, (sample, unit, end)
