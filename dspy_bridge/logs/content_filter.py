"""Log records without contents. What a library or an exception says may quote an LM's answer or a caller's inputs;
what stands in the source code at the place where it was said cannot. Pure, but for reading source files."""

from __future__ import annotations

import copy
import linecache
import os
import re
import sys
import traceback

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging

# Their records are messages about what they are working on.
_LIBRARIES = ("dspy", "litellm")
# Here only the first line is always the same: pydantic's warnings and asyncio's complaints quote values after it.
_FIRST_LINE = ("py.warnings", "asyncio")
# Python's own texts for these name types, attributes and modules, no values.
_OF_PYTHON = (AttributeError, ImportError, ModuleNotFoundError, NameError, RecursionError, TypeError, UnboundLocalError)
_PLACEHOLDER = re.compile(r"%%|%[^a-zA-Z%]*[a-zA-Z]")
# A call may take some lines; a longer text than that is no fixed one.
_LINES = 4
_MOST_FIXED = 200
# Fewer characters may be there by chance.
_LEAST_FIXED = 4


def without_contents(record: logging.LogRecord) -> logging.LogRecord:
    """The record, or a copy that holds none. A host's own records are its own business."""
    first_line = record.name in _FIRST_LINE
    library = not first_line and _in_library(record.pathname)
    if not (first_line or library or record.name == "dspy_bridge"):
        return record
    told = copy.copy(record)
    if first_line:
        told.msg, told.args = record.getMessage().partition("\n")[0], ()
    elif library:
        text = str(record.msg)
        fixed = (
            _PLACEHOLDER.sub(lambda found: "%" if found[0] == "%%" else "…", text)
            if record.args
            else from_source(text, record.pathname, record.lineno)
        )
        told.msg, told.args = fixed, ()
    if record.exc_info and record.exc_info[1] is not None:
        told.exc_text = traceback_of(record.exc_info[1])
    return told


def traceback_of(error: BaseException) -> str:
    """Its traceback and those of what it followed from; of their texts only what the source code has."""
    parts: list[str] = []
    seen: set[int] = set()
    left: BaseException | None = error
    while left is not None and id(left) not in seen:
        seen.add(id(left))
        frames = "".join(traceback.format_tb(left.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(left).__name__}: {_text(left)}")
        left = left.__cause__ or (None if left.__suppress_context__ else left.__context__)
    return "\n\nwhich led to:\n\n".join(reversed(parts))


def from_source(text: str, file: str, line: int) -> str:
    """The beginning of `text` that stands in the source code there."""
    source = "".join(linecache.getline(file, line + more) for more in range(_LINES))
    sizes = range(min(len(text), _MOST_FIXED), _LEAST_FIXED - 1, -1)
    known = next((size for size in sizes if any(quote + text[:size] in source for quote in "'\"")), 0)
    return text if known == len(text) else f"{text[:known]}…"


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:  # its own code
        return "…"
    places = list(traceback.walk_tb(error.__traceback__))
    if not places:
        return "…"
    frame, line = places[-1]
    file = frame.f_code.co_filename
    if type(error) in _OF_PYTHON and "raise" not in linecache.getline(file, line):
        return text
    return from_source(text, file, line)


def _in_library(path: str) -> bool:
    for name in _LIBRARIES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and path.startswith(os.path.dirname(file) + os.sep):
            return True
    return False
