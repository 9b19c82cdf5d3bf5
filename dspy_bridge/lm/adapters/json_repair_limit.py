"""A limit on the repair of broken JSON from an LM, which DSPy does with `json_repair`.

Some strings take the square of their length to repair, on the event loop: 8 KB of `["` blocked every other call for
seconds. How long one takes shows only on the way, so steps are counted: `json_repair` reads a string character by
character. Valid JSON takes no step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dspy_bridge.lm import dspy_internals

# 0.3 to 0.5 s. What LMs break in practice takes some five steps a character.
MOST_STEPS = 1_000_000
# Characters times braces: below, DSPy's own search takes a fraction of a second.
_SHORT = 1_000_000


class TooMuchToRepair(ValueError):
    """Broken JSON that would take too long to repair, or is nested too deeply."""

    def __init__(self) -> None:
        super().__init__("expected JSON, got text that takes too long to repair or is nested too deeply")


class _Counted(str):
    """A string that counts the characters that are read of it."""

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


def install() -> None:
    """Limit `json_repair.loads` and `dspy.JSONAdapter`, once in a process."""
    dspy_internals.JSON_REPAIR.wrap(lambda _loads_all: _loads)
    dspy_internals.JSON_PARSE.wrap(_parsing_an_object)


def _counting(loads: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(loads)
    def counted(json_str: Any = "", *args: Any, **options: Any) -> Any:
        text = _Counted(json_str) if type(json_str) is str else json_str
        value: Any = loads(text, *args, **options)
        return str(value) if type(value) is _Counted else value

    return counted


_loads = _counting(dspy_internals.JSON_REPAIR.value) if dspy_internals.JSON_REPAIR.there else None


def _parsing_an_object(parse: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(parse)
    def parsed(self: Any, signature: Any, completion: str) -> Any:
        return parse(self, signature, _object_in(completion))

    return parsed


def _object_in(completion: str) -> str:
    """The part of an answer that DSPy reads. Where the answer is not an object, DSPy searches the first matching braces
    by a recursive pattern that takes the square of the length; this takes one pass."""
    if len(completion) * completion.count("{") <= _SHORT:
        return completion
    try:
        if _loads is not None and isinstance(_loads(completion), dict):
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
