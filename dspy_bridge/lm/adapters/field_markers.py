"""Field markers, which separate the fields of prompts and answers: escapes them in text, and splits answers at them.

Pure, and linear in the length of the text: no part of a pattern can match where another one may begin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any
from xml.etree import ElementTree

Change = Callable[[str], str]

# For `dspy.ChatAdapter` a field begins with a line that begins with it.
_HEADER = re.compile(r"\[\[ ## (\w+) ## \]\]")
# DSPy reads what follows this in a prompt, up to an end mark, as parts of a message, such as images by URL. Where there
# are no end marks its pattern takes the square of the length: 64 KB hold the GIL for 3 s.
_TYPE = "<<CUSTOM-TYPE-"


def without_headers(text: str) -> str:
    """The text with `(( ## name ## ))` for each `[[ ## name ## ]]`."""
    return _HEADER.sub(r"(( ## \1 ## ))", text)


def without_types(text: str) -> str:
    """The text without anything that DSPy reads as the beginning or the end of an image or the like."""
    return text.replace(_TYPE, "((CUSTOM-TYPE-")


def changed(value: Any, change: Change, other: Callable[[Any], Any] = lambda value: value) -> Any:
    """A value with each string in it changed, keys too; `other`: what becomes of objects that are no plain containers.

    The same object if nothing is changed: the copy of a set may have another order.
    """
    made: Any = value
    if isinstance(value, str):
        made = change(value)
    elif isinstance(value, dict):
        made = {changed(key, change): changed(item, change, other) for key, item in value.items()}
    else:
        for kind in (list, tuple, set, frozenset):
            if isinstance(value, kind):
                made = kind(changed(one, change, other) for one in value)
                break
        else:
            made = other(value)
    return value if made == value else made


def without_tags(text: str, names: Set[str]) -> str:
    """The text with `&lt;` for the `<` of each XML tag of those names: if an LM copies it, it is read as text."""
    if "<" not in text:
        return text
    return re.sub(rf"<(?=/?(?:{'|'.join(sorted(map(re.escape, names)))})(?:[\s/<>]|\Z))", "&lt;", text)


def headed(answer: str) -> Iterator[tuple[str, str]]:
    """The sections of an answer, each with its header's name, as `dspy.ChatAdapter` splits it."""
    name: str | None = None
    lines: list[str] = []
    for line in answer.splitlines():
        found = _HEADER.match(line.strip())
        if found is None:
            lines.append(line)
            continue
        if name is not None:
            yield name, "\n".join(lines).strip()
        # DSPy cuts there also if spaces stand before the header.
        name, lines = found[1], [line[found.end() :].strip()]
    if name is not None:
        yield name, "\n".join(lines).strip()


def keyed(answer: str) -> list[tuple[str, Any]]:
    """The keys and values of the first JSON object in an answer, with repeated keys; none if it is not JSON."""
    found: list[list[tuple[str, Any]]] = [[]]

    def closed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found[0] = pairs  # the outermost object is closed last
        return dict(pairs)

    try:
        json.JSONDecoder(object_pairs_hook=closed).raw_decode(answer, max(0, answer.find("{")))
    except (ValueError, RecursionError):
        return []  # DSPy repairs it, or not
    return found[0]


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
