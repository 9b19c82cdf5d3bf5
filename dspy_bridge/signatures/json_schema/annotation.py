"""JSON Schema to an annotation: what DSPy shows an LM is the schema itself, what checks a value is pydantic's core.

Words that are not checked are refused, but for those that only tell: nothing is silently ignored.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Union

import pydantic
from pydantic_core import CoreSchema, SchemaValidator, core_schema

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.signatures.json_schema import converter, keywords, patterns

# Lists and objects inside each other in the whole text, values (default, enum) included. Frames end at 200.
MAX_NESTING = 200

# A number is a float here, as for the type text `float`: DSPy tells LMs of it best. 5 comes back as 5.0, from inside
# lists and objects as 5. And where the type is not `str` alone, DSPy reads a text of an LM's answer as JSON again
# before it is checked: of {"type": ["string", "integer"]}, "5" becomes 5 and "[1]" is refused. Only an adapter could
# mend that.
_SCALARS: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)}


def to_annotation(schema: dict[str, Any], where: str) -> Any:
    """The annotation for a JSON Schema object. Raises `InvalidArgs`, which names the place in it.

    Where Python has a type of its own (`str`, `Literal[…]`, `Optional[int]`) it is that, as DSPy knows these best:
    plain, or `Annotated` with what more the schema asks for. Else a class of its own.
    """
    _refuse_deep(schema, where)
    core, shown = converter.convert(schema, where)
    validator = SchemaValidator(core)

    def validate(value: Any) -> Any:
        return validator.validate_python(value, context=patterns.Budget())

    shape = type(_name_of(shown), (_Shape,), {"validate": staticmethod(validate), "shown": json.dumps(shown)})
    try:
        pydantic.TypeAdapter(shape).json_schema()
    except Exception as error:  # pydantic follows any "$ref" in it, one that is data included
        raise InvalidArgs(f"{where}: cannot be shown to an LM: {type(error).__name__}") from None
    plain = _plain(shown)
    if plain is None:
        return shape
    return plain if _is_told_by(plain, shown) else Annotated[plain, shape]


class _Shape:
    """A type that is a JSON Schema. As metadata of an `Annotated` it stands for all of the type's own checks."""

    validate: Any
    shown: str

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> CoreSchema:
        # The validator is made once: DSPy asks for one at each call, and this keeps it at 30 µs for any schema.
        return core_schema.no_info_plain_validator_function(cls.validate)

    @classmethod
    def __get_pydantic_json_schema__(cls, _core: CoreSchema, _handler: Any) -> Any:
        return json.loads(cls.shown)  # a new one each time: pydantic and DSPy change what they get


def _name_of(shown: dict[str, Any]) -> str:
    """The name of the type, which DSPy's prompts hold: the title, or what it is in Python."""
    title = re.sub(r"\W", "", shown.get("title", ""))[:60]
    return title if title.isidentifier() else {"object": "dict", "array": "list"}.get(str(shown.get("type")), "JSON")


def _plain(shown: dict[str, Any]) -> Any:
    """Python's own type for what is shown; None where it has none."""
    if set(shown) <= keywords.TOLD:
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
    # DSPy asks an LM for structured output where it can, and has to know of a map, which cannot be had that way.
    return dict[str, Any] if kind == "object" and "properties" not in shown else _SCALARS.get(kind)


def _is_told_by(plain: Any, shown: dict[str, Any]) -> bool:
    """Whether the Python type says all that the schema does."""
    if plain is Any:
        return "examples" not in shown
    choices = shown.get("anyOf", ())
    return set(shown) <= {"type", "enum", "const", "anyOf", "title", "description", "default"} and all(
        _is_told_by(_plain(choice), choice) for choice in choices
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
