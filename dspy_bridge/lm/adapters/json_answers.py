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
import json
from typing import Any

import json_repair

from dspy_bridge.lm import dspy_internals, lm_call

# 0.3 to 0.5 s. What LMs break in practice takes some five steps a character.
MOST_STEPS = 1_000_000
# Characters times braces: below, DSPy's own search for an object takes a fraction of a second.
_MOST_BRACES = 1_000_000
_repair = json_repair.loads


@dspy_internals.RESPONSE_FORMAT.replace
def _choose_format(adapter: Any, lm: Any, lm_kwargs: dict[str, Any], signature: Any) -> None:
    before = lm_kwargs.get("response_format")
    dspy_internals.RESPONSE_FORMAT.value(adapter, lm, lm_kwargs, signature)
    asked = lm_kwargs.get("response_format")
    if asked is not before and isinstance(asked, type) and _has_map(asked):
        asked = lm_kwargs["response_format"] = {"type": "json_object"}
    meter = lm_call.run().meter
    if meter is not None and asked == {"type": "json_object"} and lm.supports_response_schema:
        meter.fell_back()


@functools.lru_cache(256)
def _has_map(model: Any) -> bool:
    schema = model.model_json_schema()
    return _in_schema([schema.get("properties"), schema.get("$defs")])


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
    value: Any = _repair(text, *args, **options)
    return str(value) if type(value) is _Counted else value


json_repair.loads = _loads


def object_in(completion: str) -> str:
    """The part of an answer that DSPy is to read. If it is no object DSPy searches it for one by a pattern that takes
    the square of the length. Raises `TooMuchToRepair`."""
    if len(completion) * completion.count("{") <= _MOST_BRACES or isinstance(_loads(completion), dict):
        return completion
    begin = completion.index("{")
    try:
        return completion[begin : json.JSONDecoder().raw_decode(completion, begin)[1]]
    except (ValueError, RecursionError):
        raise TooMuchToRepair from None
