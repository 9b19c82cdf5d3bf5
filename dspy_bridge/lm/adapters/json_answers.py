"""How answers in JSON are asked for, and how long they may take to repair. Imports DSPy.

Outputs with free-form maps, anywhere in their types, are asked for in JSON mode, without a response schema. DSPy does
so where an output itself is one. Of a map inside another type it makes an object without properties: the LM may answer
`{}` only, and no error shows it.

Broken JSON is repaired by `json_repair`. Some strings take the square of their length, on the event loop: 8 KB of `["`
blocked every other call for seconds. How long one takes shows only on the way, so steps are counted: `json_repair`
reads a string character by character. Valid JSON takes no step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import dspy
import pydantic

from dspy_bridge.lm import dspy_internals

# 0.3 to 0.5 s. What LMs break in practice takes some five steps a character.
MOST_STEPS = 1_000_000
# Characters times braces: below, DSPy's own search takes a fraction of a second.
_SHORT = 1_000_000


def install() -> None:
    """Put these in the place of DSPy's and `json_repair`'s, once in a process."""
    dspy_internals.OPEN_MAPS.wrap(_looking_inside)
    dspy_internals.JSON_REPAIR.wrap(lambda _loads_all: _loads)
    dspy_internals.JSON_PARSE.wrap(_parsing_an_object)


def _looking_inside(has_open_map: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def looked(signature: Any) -> bool:
        # Native function calls are not part of the answer's text.
        kinds = {field.annotation for field in signature.output_fields.values()} - {dspy.ToolCalls}
        return has_open_map(signature) or any(map(_has_map, kinds))

    return looked


@functools.lru_cache(256)
def _has_map(annotation: Any) -> bool:
    try:
        return _in_schema(pydantic.TypeAdapter(annotation).json_schema())
    except (pydantic.PydanticUserError, ValueError):
        return False  # DSPy finds it out, too


def _in_schema(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_in_schema, schema))
    if not isinstance(schema, dict):
        return False
    if schema.get("type") == "object" and (
        not schema.get("properties") or schema.get("additionalProperties") or schema.get("patternProperties")
    ):
        return True
    return any(map(_in_schema, schema.values()))


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


def _loads(json_str: Any = "", *args: Any, **options: Any) -> Any:
    text = _Counted(json_str) if type(json_str) is str else json_str
    value: Any = dspy_internals.JSON_REPAIR.value(text, *args, **options)
    return str(value) if type(value) is _Counted else value


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
        if dspy_internals.JSON_REPAIR.there and isinstance(_loads(completion), dict):
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
