"""Reads the arguments in a tool's definition: `args`, or `parameters`, a JSON Schema. Imports DSPy."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pydantic

from dspy_bridge.errors import InvalidArgs, refuse_unknown, step
from dspy_bridge.lm import dspy_internals
from dspy_bridge.signatures.builder import description
from dspy_bridge.signatures.type_parser import read_type

# Parameters of `dspy.Tool` and its callbacks.
_NOT_AS_ARGUMENT = ("self", "instance")
# Per tool. A call of it holds the event loop for 0.4 ms for each.
MAX_ARGS = 100


class Arg(NamedTuple):
    """An argument of a tool. `schema`: what the LM is shown. `default`: `...` if there is none."""

    type: Any
    validator: pydantic.TypeAdapter[Any]
    schema: dict[str, Any]
    default: Any
    required: bool
    null_is_left_out: bool


def read(definition: dict[str, Any], where: str) -> dict[str, Arg]:
    """The arguments of a tool, by name. Raises `InvalidArgs`, naming the field."""
    if "parameters" in definition:
        if "args" in definition:
            raise InvalidArgs(f"{where}: has args and parameters; expected one of them")
        args, place = _of_parameters(definition["parameters"], f"{where}.parameters"), f"{where}.parameters.properties"
    else:
        args, place = definition.get("args", {}), f"{where}.args"
    if not isinstance(args, dict):
        raise InvalidArgs(f'{place}: expected an object such as {{"query": {{"type": "str"}}}}')
    if len(args) > MAX_ARGS:
        raise InvalidArgs(f"{place}: expected at most {MAX_ARGS}")
    return {arg: _arg(arg, given, place + step(arg)) for arg, given in args.items()}


def _of_parameters(parameters: object, where: str) -> dict[str, Any]:
    """The properties of a JSON Schema object as `args`."""
    if not isinstance(parameters, dict) or parameters.get("type") != "object":
        raise InvalidArgs(f'{where}: expected a JSON Schema such as {{"type": "object", "properties": {{}}}}')
    # As the LM would be shown it: without references, so that each property stands alone.
    _, schema = _shown(read_type(parameters, where), where)
    properties, required = schema.get("properties", {}), schema.get("required", ())
    for arg in required:
        properties.setdefault(arg, {})  # one that is required alone may be anything
    return {arg: {"type": part, "optional": arg not in required} for arg, part in properties.items()}


def _arg(arg: str, given: object, where: str) -> Arg:
    if arg in _NOT_AS_ARGUMENT:
        raise InvalidArgs(f"{where}: {arg!r} is an argument of DSPy's own; choose another name")
    # Short form: only the type.
    given = given if isinstance(given, dict) else {"type": given}
    refuse_unknown(given, ("type", "description", "desc", "default", "optional"), where)
    kind = given.get("type")
    type_ = read_type(kind, f"{where}.type")
    validator, schema = _shown(type_, f"{where}.type")
    own = kind if isinstance(kind, dict) else {}
    if not isinstance(optional := given.get("optional"), bool) and "optional" in given:
        raise InvalidArgs(f"{where}.optional: expected true or false")
    described = description(given, where) or own.get("description")
    default = given.get("default", own.get("default", ...))
    if "default" in given and not _fits(default, kind, validator):
        if default is not None:
            raise InvalidArgs(f"{where}.default: does not fit the type that it is for")
        # No value of the type: many write null for "may be left out".
        default, optional = ..., True
    elif default is ... and optional is None and _takes_null(schema):
        default = None
    if default is not ...:
        schema["default"] = default
    elif optional:
        described = f"{described} (optional)" if described else "optional"
    if described:
        schema["description"] = described
    required = default is ... and not optional
    left_out = not required and (default is ... or not _takes_null(schema))
    return Arg(type_, validator, schema, default, required, left_out)


def _fits(default: object, kind: object, validator: pydantic.TypeAdapter[Any]) -> bool:
    try:
        if isinstance(kind, dict):
            read_type({**kind, "default": default}, "")
        else:
            # Strict, without conversions; as JSON, in which a date is text.
            validator.validate_json(json.dumps(default), strict=True)
    except (InvalidArgs, ValueError):
        return False
    return True


def _takes_null(schema: dict[str, Any]) -> bool:
    """Whether the schema names null; one that takes anything does not."""
    choices = [schema, *schema.get("anyOf", ())]
    return any(None in choice.get("enum", ()) or "null" in choice.get("type", ()) for choice in choices)


def _shown(type_: Any, where: str) -> tuple[pydantic.TypeAdapter[Any], dict[str, Any]]:
    """The type's validator, and its schema as the LM is shown it."""
    try:
        validator: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(type_)
        schema = validator.json_schema()
        if "$defs" in schema and dspy_internals.TOOL_SCHEMAS.there:
            # References are replaced: DSPy and providers want each argument by itself.
            whole = {"properties": {"it": schema}, "$defs": schema["$defs"]}
            schema = dspy_internals.TOOL_SCHEMAS.value(whole)[0]["it"]
    except (pydantic.PydanticUserError, RecursionError):
        raise InvalidArgs(f"{where}: not an argument type; expected one with a JSON Schema, not recursive") from None
    return validator, schema
