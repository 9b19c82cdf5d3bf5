"""Converts a JSON Schema to an annotation. DSPy shows the LM the schema itself; pydantic-core validates the values.

Keywords that are not validated are refused, except for descriptive ones: nothing is silently ignored.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Union

import pydantic
from pydantic_core import CoreSchema, SchemaValidator, core_schema

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.signatures.json_schema import converter, keywords, patterns

# Nesting of lists and objects in a schema, values (default, enum) included. Frames have the same limit.
MAX_NESTING = 200

# "number" is `float`, which DSPy describes best to LMs: 5 is returned as 5.0, but as 5 inside lists and objects. Unless
# the type is only `str`, DSPy parses a string of an LM's answer as JSON before it is validated: with
# {"type": ["string", "integer"]}, "5" becomes 5 and "[1]" is refused. Only an adapter could change that.
_SCALARS: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)}


def to_annotation(schema: dict[str, Any], where: str) -> Any:
    """The annotation for a JSON Schema object. Raises `InvalidArgs`, which names the place in it.

    Python's own type where there is one (`str`, `Literal[…]`, `Optional[int]`), as DSPy supports these best: plain, or
    `Annotated` with further constraints. Else a new class.
    """
    _refuse_deep(schema, where)
    core, shown = converter.convert(schema, where)
    validator = SchemaValidator(core)

    def validate(value: Any) -> Any:
        return validator.validate_python(value, context=patterns.Budget())

    shape = type(_name_of(shown), (_Shape,), {"validate": staticmethod(validate), "shown": json.dumps(shown)})
    try:
        pydantic.TypeAdapter(shape).json_schema()
    except Exception as error:  # pydantic follows any "$ref", even in data
        raise InvalidArgs(f"{where}: cannot be shown to an LM: {type(error).__name__}") from None
    plain = _plain(shown)
    if plain is None:
        return shape
    return plain if _is_expressed_by(plain, shown) else Annotated[plain, shape]


class _Shape:
    """A type with the validator of a schema. As metadata of `Annotated` it replaces the type's own validation."""

    validate: Any
    shown: str

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> CoreSchema:
        # Created once: DSPy builds a validator of the type in each call, which takes 30 µs with this.
        return core_schema.no_info_plain_validator_function(cls.validate)

    @classmethod
    def __get_pydantic_json_schema__(cls, _core: CoreSchema, _handler: Any) -> Any:
        return json.loads(cls.shown)  # a copy: pydantic and DSPy modify it


def _name_of(shown: dict[str, Any]) -> str:
    """The type's name, which is in DSPy's prompts: the title, or Python's name."""
    title = re.sub(r"\W", "", shown.get("title", ""))[:60]
    return title if title.isidentifier() else {"object": "dict", "array": "list"}.get(str(shown.get("type")), "JSON")


def _plain(shown: dict[str, Any]) -> Any:
    """Python's own type for a schema, if any."""
    if set(shown) <= keywords.DESCRIPTIVE:
        return Any
    if "enum" in shown or "const" in shown:
        values = tuple(shown.get("enum", [shown.get("const")]))
        return None if any(isinstance(value, float) for value in values) else Literal[values]
    kinds = shown.get("type", [])
    members = [_base(shown, kind) for kind in (kinds if isinstance(kinds, list) else [kinds])]
    members += [_plain(choice) for choice in shown.get("anyOf", ())]
    if None in members or Any in members:
        return None
    return Union[tuple(members)]  # noqa: UP007 - built from values


def _base(shown: dict[str, Any], kind: str) -> Any:
    # DSPy must know maps, which cannot be requested as structured output.
    return dict[str, Any] if kind == "object" and "properties" not in shown else _SCALARS.get(kind)


def _is_expressed_by(plain: Any, shown: dict[str, Any]) -> bool:
    """Whether the Python type expresses all of the schema."""
    if plain is Any:
        return "examples" not in shown
    choices = shown.get("anyOf", ())
    return set(shown) <= {"type", "enum", "const", "anyOf", "title", "description", "default"} and all(
        _is_expressed_by(_plain(choice), choice) for choice in choices
    )


def _refuse_deep(schema: dict[str, Any], where: str) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_NESTING):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise InvalidArgs(f"{where}: nested too deep; expected at most {converter.MAX_DEPTH} schemas inside each other")
