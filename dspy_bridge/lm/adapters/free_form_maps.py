"""Outputs with free-form maps, anywhere in their types, are asked for in JSON mode, without a response schema.

DSPy does so where an output itself is one. Of a map inside another type it makes an object without properties: the LM
may answer `{}` only, and no error shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import dspy
import pydantic

from dspy_bridge.lm import dspy_internals


def install() -> None:
    """Extend DSPy's own check, once in a process."""
    dspy_internals.OPEN_MAPS.wrap(_looking_inside)


def _looking_inside(has_open_map: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @functools.wraps(has_open_map)
    def looked(signature: Any) -> bool:
        return has_open_map(signature) or any(
            _of_type(field.annotation)
            # Native function calls are not part of the answer's text.
            for field in signature.output_fields.values()
            if field.annotation is not dspy.ToolCalls
        )

    return looked


@functools.lru_cache(256)
def _of_type(annotation: Any) -> bool:
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
