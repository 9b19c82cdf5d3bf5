"""Removes contents from log records.

The message of a library's record or of an exception may quote an LM's answer or a client's inputs. Only the part that
appears in the source code where it was logged or raised is kept. Pure, except that it reads source files.
"""

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

# Their records may quote what they work on.
_LIBRARIES = ("dspy", "litellm")
# Only the first line is fixed: pydantic's warnings and asyncio's errors quote values after it.
_FIRST_LINE = ("py.warnings", "asyncio")
# Python's messages for these name types, attributes and modules, not values.
_OF_PYTHON = (AttributeError, ImportError, ModuleNotFoundError, NameError, RecursionError, TypeError, UnboundLocalError)
_PLACEHOLDER = re.compile(r"%%|%[^a-zA-Z%]*[a-zA-Z]")
# The most lines of a call, and the longest string that is searched for in the source.
_LINES = 4
_MOST_FIXED = 200
# Fewer characters may match by chance.
_LEAST_FIXED = 4


def without_contents(record: logging.LogRecord) -> logging.LogRecord:
    """The record, or a copy without contents. Records of user code are kept as they are."""
    first_line = record.name in _FIRST_LINE
    library = not first_line and _in_library(record.pathname)
    if not (first_line or library or record.name == "dspy_bridge"):
        return record
    cleaned = copy.copy(record)
    if first_line:
        cleaned.msg, cleaned.args = record.getMessage().partition("\n")[0], ()
    elif library:
        text = str(record.msg)
        fixed = (
            _PLACEHOLDER.sub(lambda found: "%" if found[0] == "%%" else "…", text)
            if record.args
            else from_source(text, record.pathname, record.lineno)
        )
        cleaned.msg, cleaned.args = fixed, ()
    if record.exc_info and record.exc_info[1] is not None:
        cleaned.exc_text = traceback_of(record.exc_info[1])
    return cleaned


def traceback_of(error: BaseException) -> str:
    """The tracebacks of `error` and its causes; of their messages only what the source code has."""
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
    """The beginning of `text` that appears in the source code at that line."""
    source = "".join(linecache.getline(file, line + more) for more in range(_LINES))
    sizes = range(min(len(text), _MOST_FIXED), _LEAST_FIXED - 1, -1)
    known = next((size for size in sizes if any(quote + text[:size] in source for quote in "'\"")), 0)
    return text if known == len(text) else f"{text[:known]}…"


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:  # str() may run any code
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
