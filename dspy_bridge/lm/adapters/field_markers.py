"""Field markers, which separate the fields of prompts and answers: escapes them in text, and splits answers at them.

Pure, and linear in the length of the text: no regular expressions.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from typing import Any
from xml.etree import ElementTree

Change = Callable[[str], str]

# For `dspy.ChatAdapter` a field begins with a line that begins with `[[ ## name ## ]]`.
_OPEN, _CLOSE = "[[ ## ", " ## ]]"
# DSPy reads what follows this in a prompt, up to an end mark, as parts of a message, such as images by URL. Where there
# are no end marks its pattern takes the square of the length: 64 KB hold the GIL for 3 s.
_TYPE = "<<CUSTOM-TYPE-START-IDENTIFIER>>"


def without_headers(text: str) -> str:
    """The text with `(( ## name ## ))` for each `[[ ## name ## ]]`."""
    if _OPEN not in text:
        return text
    before, *rest = text.split(_OPEN)
    parts = [before]
    for piece in rest:
        name, closed, after = piece.partition(_CLOSE)
        parts += ("(( ## ", name, " ## ))", after) if closed and _is_word(name) else (_OPEN, piece)
    return "".join(parts)


def without_types(text: str) -> str:
    """The text without anything that DSPy reads as the beginning of an image or the like."""
    return text.replace(_TYPE, "((CUSTOM-TYPE-START-IDENTIFIER))")


def changed(value: Any, change: Change) -> Any:
    """A value with each string in it changed, keys too. Objects that are not plain containers stay as they are.

    The same object if nothing is changed: the copy of a set may have another order.
    """
    if isinstance(value, str):
        text = change(value)
        return value if text == value else text
    if isinstance(value, dict):
        keys, items = _changed_all(value, change), _changed_all(value.values(), change)
        if keys is None and items is None:
            return value
        return dict(zip(keys or value, items or value.values(), strict=True))
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            found = _changed_all(value, change)
            return value if found is None else kind(found)
    return value


def _changed_all(values: Collection[Any], change: Change) -> list[Any] | None:
    """None if nothing is changed."""
    made = [changed(value, change) for value in values]
    return None if all(map(operator.is_, made, values)) else made


def without_tags(text: str, names: Set[str]) -> str:
    """The text with `&lt;` for the `<` of each XML tag of those names: if an LM copies it, it is read as text."""
    if "<" not in text:
        return text
    before, *rest = text.split("<")
    parts = [before]
    for piece in rest:
        parts += ("&lt;" if _tag(piece) in names else "<", piece)
    return "".join(parts)


def headed(answer: str) -> Iterator[tuple[str, str]]:
    """The sections of an answer, each with its header's name, as `dspy.ChatAdapter` splits it."""
    name: str | None = None
    lines: list[str] = []
    for line in answer.splitlines():
        found = _header(line.strip())
        if found is None:
            lines.append(line)
            continue
        if name is not None:
            yield name, "\n".join(lines).strip()
        # DSPy cuts there also if spaces stand before the header.
        name, lines = found, [line[len(_OPEN) + len(found) + len(_CLOSE) :].strip()]
    if name is not None:
        yield name, "\n".join(lines).strip()


def keyed(answer: str) -> list[tuple[str, Any]]:
    """The keys and values of the first JSON object in an answer, with repeated keys; none if it is not JSON."""
    pairs: list[tuple[str, Any]] = []

    def closed(found: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal pairs
        pairs = found  # the outermost object is closed last
        return dict(found)

    try:
        json.JSONDecoder(object_pairs_hook=closed).raw_decode(answer, max(0, answer.find("{")))
    except (ValueError, RecursionError):
        return []  # DSPy repairs it, or not
    return pairs


def tagged(answer: str) -> list[tuple[str, str]]:
    """The elements of an answer, each with its name, as `dspy.XMLAdapter` reads them; none if it is not XML."""
    found = []
    try:
        elements = ElementTree.fromstring(f"<all>{answer}</all>")
    except ElementTree.ParseError:
        return []  # DSPy refuses it
    for child in elements:
        child.tail = None
        name = child.get("key", child.tag) if child.tag == "entry" else child.tag
        found.append((name, ElementTree.tostring(child, encoding="unicode").strip()))
    return found


def contradicted(values: Iterable[tuple[str, Any]]) -> str | None:
    """The first name that has two different values."""
    first: dict[str, Any] = {}
    return next((name for name, value in values if first.setdefault(name, value) != value), None)


def _header(line: str) -> str | None:
    if not line.startswith(_OPEN):
        return None
    name, closed, _ = line[len(_OPEN) :].partition(_CLOSE)
    return name if closed and _is_word(name) else None


def _is_word(name: str) -> bool:
    r"""What `\w+` matches."""
    return name.replace("_", "a").isalnum()


def _tag(piece: str) -> str:
    """The name of the tag whose `<` stands before `piece`."""
    inside = piece.removeprefix("/").partition(">")[0]
    # A leading space is not a tag's, but that of `a < b`.
    return "" if inside[:1].isspace() else (inside.split(None, 1) or [""])[0].partition("/")[0]
