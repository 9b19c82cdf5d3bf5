r"""The keyword `pattern`. Matched by Rust's regex crate, which never backtracks. Pure.

Rust's own limit of 10 MB for a compiled pattern is too high: one takes up to 28 MB and 0.2 s, pydantic caches the last
50, and a match takes the string's length times the pattern's size, with the GIL held: over half a minute for 0.1 MB.
So size and length are bounded here: 10 ms for compiling a pattern, 0.1 s for a match. Types refer to patterns by their
source, so that programs do not keep compiled ones.
As in JavaScript and Elixir, \w and \d are ASCII's. Unicode's \w takes 60 KB each.
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

# Different patterns in one schema, and in our cache. At worst ten take 12 MB, and 30 MB after matching strings made for
# that; pydantic's 50 then take 80 MB. A usual pattern takes 0.1 MB.
MOST = 10
MAX_CHARS = 1000
# Size with all repetitions written out, in ASCII characters of 0.15 KB each.
MAX_SIZE = 6000
_WIDE = 6  # any character, or a negated class
_SET = 400  # a Unicode class: hundreds of ranges

# Size times length of the string: 5 to 14 ns each at worst.
MAX_WORK = 10_000_000
# For all strings of one value, in seconds: 10 MB with usual patterns.
MAX_SECONDS = 0.25

_ASCII = {"w": "[0-9A-Za-z_]", "W": "[^0-9A-Za-z_]", "d": "[0-9]", "D": "[^0-9]"}


class Budget:
    """The time left for the patterns of one value. Passed as pydantic's validation context."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = MAX_SECONDS


def read(pattern: object, where: str) -> Callable[[str, ValidationInfo], str]:
    """The validator of a pattern, for validations whose context is a `Budget`. Raises `InvalidArgs`."""
    unknown = f"{where}: cannot be read; expected a regular expression, without look-around and back references"
    if not isinstance(pattern, str):
        raise InvalidArgs(unknown)
    if len(pattern) > MAX_CHARS:
        raise InvalidArgs(f"{where}: expected at most {MAX_CHARS} characters")
    rust = re.sub(r"\\(.)", lambda found: _ASCII.get(found[1], found[0]), pattern, flags=re.DOTALL)
    size = _size(rust)
    if size > MAX_SIZE:
        raise InvalidArgs(f"{where}: too large, its repetitions written out; limit the string with maxLength")
    try:
        _compiled(rust)
    except SchemaError:
        raise InvalidArgs(unknown) from None
    longest = int(MAX_WORK / max(size, 1))

    def match(text: str, info: ValidationInfo) -> str:
        if len(text) > longest:
            message = "Input should have at most {longest} characters, for its pattern"
            raise PydanticCustomError("pattern_work", message, {"longest": longest})
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


# The tokens of `_size`, inside a class and outside: escapes, the start of a class or group, counts, characters.
_ESCAPE = (
    r"(?P<set>\\[pP](?:\{[^}]*\}?|.?))|(?P<wide>\\(?:[xuU]\{[^}]*\}?|x.{,2}|u.{,4}|U.{,8}|s))|(?P<wider>\\S)"
    r"|(?P<escape>\\.?)|(?P<class>\[\^?\]?)"
)
_IN_CLASS = re.compile(_ESCAPE + "|.", re.DOTALL)
_OUTSIDE = re.compile(_ESCAPE + r"|(?P<group>\((?:\?[^:)>]*)?)|(?P<count>\{[^}]*\}?)|(?P<none>[*+?|^$])|.", re.DOTALL)
_SIZES = {"set": _SET, "wide": _WIDE, "wider": 2 * _WIDE, "escape": 1}


def _size(pattern: str) -> float:
    """The size with all repetitions written out, in one pass. Meaningless for a pattern that Rust refuses."""
    groups = [0.0]  # sizes of the open groups and classes
    last = 0.0  # of what a `{…}` at this place repeats
    in_class = 0
    cases = 1
    at = 0
    while found := (_IN_CLASS if in_class else _OUTSIDE).match(pattern, at):
        at, step, kind = found.end(), found[0], found.lastgroup
        if kind == "class":
            in_class += 1
            groups.append(_WIDE if "^" in step else 1)
        elif kind == "group":
            groups.append(1)
            if "<" not in step and "x" in step:
                return MAX_SIZE + 1  # comments may hold anything
            if "<" not in step and "i" in step:
                cases = 2
        elif kind == "count":
            times = max((min(int(n), MAX_SIZE + 1) for n in re.findall(r"\d+", step)), default=1)
            groups[-1] += last * max(0, times - 1)
            last *= max(1, times)
        elif kind != "none":
            if step == ("]" if in_class else ")"):
                in_class = max(0, in_class - 1)
                last = groups.pop()
                groups = groups or [0.0]
            elif kind is not None:
                last = _SIZES[kind]
            elif step > "\x7f" or (step == "." and not in_class):
                last = _WIDE
            else:
                last = 0.25 if in_class else 1  # a class is a list of ranges
            groups[-1] += last
    return sum(groups) * cases
