"""What DSPy may have repaired of JSON that an LM broke. Imports DSPy, and `json_repair`, which it reads such text with.

To repair some texts takes the square of their length, on the event loop: 8 KB of `["` held up every other call for
seconds. How long one takes shows only on the way, so the steps are counted: `json_repair` looks at a text character by
character. Text that is JSON takes no step.
"""

from __future__ import annotations

import functools
from typing import Any

import dspy
import json_repair

# 0.3 to 0.5 s. What people's LMs break takes some five steps a character.
MOST_STEPS = 1_000_000
# Characters times braces: below, DSPy's own search takes a fraction of a second.
_SHORT = 1_000_000


class TooMuchToRepair(ValueError):
    """Broken JSON that would take too long to repair, or is nested too deeply."""

    def __init__(self) -> None:
        super().__init__("expected JSON, got text that takes too long to repair or is nested too deeply")


class _Counted(str):
    """A text that counts the characters it is asked for."""

    __slots__ = ("_left",)
    _left: int

    def __new__(cls, text: str) -> _Counted:
        made = super().__new__(cls, text)
        made._left = MOST_STEPS
        return made

    def __getitem__(self, key: Any) -> str:
        found = str.__getitem__(self, key)
        self._left -= len(found) or 1
        if self._left < 0:
            raise TooMuchToRepair
        return found


@functools.cache
def install() -> None:
    """Limit `json_repair.loads` and `dspy.JSONAdapter`, once in a process. Raises `AttributeError` without them."""
    loads, parse = json_repair.loads, dspy.JSONAdapter.parse

    @functools.wraps(loads)
    def counted(json_str: Any = "", *args: Any, **options: Any) -> Any:
        text = _Counted(json_str) if type(json_str) is str else json_str
        value: Any = loads(text, *args, **options)
        return str(value) if type(value) is _Counted else value

    @functools.wraps(parse)
    def with_an_object(self: Any, signature: Any, completion: str) -> Any:
        return parse(self, signature, _object_in(completion))

    json_repair.loads, dspy.JSONAdapter.parse = counted, with_an_object


def _object_in(completion: str) -> str:
    """What DSPy reads of an answer. Where there is no object at once it looks for the first braces that match, by a
    recursive pattern that takes the square of the length; here in one pass."""
    if len(completion) * completion.count("{") <= _SHORT:
        return completion
    try:
        if isinstance(json_repair.loads(completion), dict):
            return completion
    except (ValueError, RecursionError):
        raise TooMuchToRepair from None
    opened: list[int] = []
    first: tuple[int, int] | None = None
    for at, sign in enumerate(completion):
        if sign == "{":
            opened.append(at)
        elif sign == "}" and opened:
            start = opened.pop()
            first = (start, at + 1) if first is None or start < first[0] else first
    if first is None:
        raise TooMuchToRepair
    return completion[slice(*first)]
