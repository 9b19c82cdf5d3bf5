r"""The `pattern` of JSON Schemas. Matched by Rust's library, which never backtracks; pure.

Compiled, one could take 12 MB, and pydantic keeps the last 50 that anybody compiled: no cleanup gives them back. And a
text costs its length times the size of its pattern, with Python's lock held: 36 s for 0.1 MB of text and a pattern as
large as Rust takes. So both are bounded, and types know their patterns as text, lest every program keeps its own.
Programs are made on the loader's thread, their values checked where these come in; either way everybody waits for one
pattern: 10 ms at most while it is compiled, some 0.1 s while it is matched.
As JSON Schema says, \w and \d are ASCII's, as in JavaScript and Elixir. Unicode's \w is 60 KB wherever it stands.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationInfo
from pydantic_core import PydanticCustomError, SchemaError, SchemaValidator, core_schema

from dspy_bridge.errors import InvalidArgs

# Distinct patterns in one schema, and those that are at hand at once. At worst ten take 12 MB, and 30 MB when they have
# matched texts that were made for it; pydantic's 50 then are 80 MB. Those that people write take 0.1 MB each.
MOST = 10
MAX_CHARS = 1000
# The size of a pattern with its repetitions written out, in ASCII characters: 0.15 KB each.
MAX_SIZE = 6000
_WIDE = 6  # any character, or any but some
_UNICODE = 400  # a set of Unicode's: hundreds of ranges

# That size times the characters of a text: 5 to 14 ns each, where text and pattern were made for it.
MAX_WORK = 10_000_000
# What all texts of one value may take, in seconds: 10 MB of those that people write.
MAX_SECONDS = 0.25

_ASCII = {"w": "[0-9A-Za-z_]", "W": "[^0-9A-Za-z_]", "d": "[0-9]", "D": "[^0-9]"}


class Budget:
    """The time that the patterns of one value have left. The validation's context."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = MAX_SECONDS


def read(pattern: object, where: str) -> Callable[[str, ValidationInfo], str]:
    """What checks a text against a pattern, in a validation whose context is a `Budget`: gives the text, or raises.

    Raises `InvalidArgs`.
    """
    unknown = f"{where}: cannot be read; expected a regular expression, without look-around and back references"
    if not isinstance(pattern, str):
        raise InvalidArgs(unknown)
    if len(pattern) > MAX_CHARS:
        raise InvalidArgs(f"{where}: expected at most {MAX_CHARS} characters")
    rust = re.sub(r"\\(.)", lambda found: _ASCII.get(found[1], found[0]), pattern, flags=re.DOTALL)
    size = _size(rust)
    if size > MAX_SIZE:
        raise InvalidArgs(f"{where}: too large, its repetitions written out; bound a text with maxLength")
    try:
        _compiled(rust)
    except SchemaError:
        raise InvalidArgs(unknown) from None
    longest = int(MAX_WORK / max(size, 1))

    def match(text: str, info: ValidationInfo) -> str:
        if len(text) > longest:
            told = "Input should have at most {longest} characters, for its pattern"
            raise PydanticCustomError("pattern_work", told, {"longest": longest})
        budget = info.context
        assert isinstance(budget, Budget)
        if budget.seconds < 0:
            raise PydanticCustomError("pattern_work", "Input should take its patterns less time")
        began = time.thread_time()
        try:
            matched: str = _compiled(rust)(text)
            return matched
        finally:
            budget.seconds -= time.thread_time() - began

    return match


@functools.lru_cache(maxsize=MOST)
def _compiled(pattern: str) -> Callable[[str], Any]:
    return SchemaValidator(core_schema.str_schema(pattern=pattern)).validate_python


def _size(pattern: str) -> float:
    """How large it is with `{…}` written out, in one pass over it. Of what Rust will not read it may be anything."""
    groups = [0.0]  # of what is open; classes are groups, too
    last = 0.0  # what a `{…}` here would repeat
    in_class = 0
    cases = 1
    at = 0
    while at < len(pattern):
        sign = pattern[at]
        at += 1
        size = _WIDE if sign > "\x7f" else 0.25 if in_class else 1  # in a class, ASCII's are ranges of one step
        if sign == "[":
            in_class += 1
            negated = pattern.startswith("^", at)
            groups.append(_WIDE if negated else 1)
            at += negated
            at += pattern.startswith("]", at)  # the first one is a character
            continue
        if sign == "(" and not in_class:
            groups.append(1)
            if pattern.startswith("?", at):
                head, at = _until(":)>", pattern, at)
                if "<" not in head:
                    if "x" in head:
                        return MAX_SIZE + 1  # comments may hold anything
                    cases = 2 if "i" in head else cases
            continue
        if sign == "]" if in_class else sign == ")":
            in_class = max(0, in_class - 1)
            size = groups.pop()
            groups = groups or [0.0]
        elif sign == "\\":
            size, at = _escape(pattern, at)
        elif not in_class and sign == "{":
            counts, at = _until("}", pattern, at)
            times = max((min(int(n), MAX_SIZE + 1) for n in counts.split(",") if n.strip().isdecimal()), default=1)
            size = last * max(0, times - 1)
            groups[-1] += size
            last += size
            continue
        elif not in_class and sign in "*+?|^$":
            continue
        elif not in_class and sign == ".":
            size = _WIDE
        last = size
        groups[-1] += size
    return sum(groups) * cases


def _escape(pattern: str, at: int) -> tuple[float, int]:
    """The size of what is escaped at `at`, and where it ends."""
    kind = pattern[at : at + 1]
    at += 1
    if kind not in ("p", "P", "x", "u", "U"):
        return {"s": _WIDE, "S": 2 * _WIDE}.get(kind, 1), at
    if pattern.startswith("{", at):
        at = _until("}", pattern, at)[1]
    else:
        at += {"x": 2, "u": 4, "U": 8}.get(kind, 1)
    return _UNICODE if kind in "pP" else _WIDE, at


def _until(ends: str, pattern: str, at: int) -> tuple[str, int]:
    """What stands before the next of `ends`, and where it goes on: behind a brace, at all else."""
    end = next((n for n in range(at, len(pattern)) if pattern[n] in ends), len(pattern))
    return pattern[at:end], end + (ends == "}")
