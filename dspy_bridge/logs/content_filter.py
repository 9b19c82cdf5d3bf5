"""Removes contents from log records.

The message of a library's record or of an exception may quote an LM's answer or a client's inputs. So of an exception
its type and its places in the code are logged, of a library's record its place. Pure.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import traceback

# Their records may quote what they work on.
_LIBRARIES = ("dspy", "litellm")
# Only the first line is fixed: pydantic's warnings and asyncio's errors quote values after it.
_FIRST_LINE = ("py.warnings", "asyncio")


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
        cleaned.msg, cleaned.args = f"text withheld, {record.module}.py line {record.lineno}", ()
    if record.exc_info and record.exc_info[1] is not None:
        cleaned.exc_text = _traceback(record.exc_info[1])
    return cleaned


def _traceback(error: BaseException) -> str:
    """The tracebacks of `error` and its causes, without their texts."""
    parts: list[str] = []
    seen: set[int] = set()
    left: BaseException | None = error
    while left is not None and id(left) not in seen:
        seen.add(id(left))
        frames = "".join(traceback.format_tb(left.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(left).__name__}")
        left = left.__cause__ or (None if left.__suppress_context__ else left.__context__)
    return "\n\nwhich led to:\n\n".join(reversed(parts))


def _in_library(path: str) -> bool:
    for name in _LIBRARIES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and path.startswith(os.path.dirname(file) + os.sep):
            return True
    return False
