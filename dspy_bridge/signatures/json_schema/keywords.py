"""The supported keywords of JSON Schema and their values; validators of strings and numbers. Pure."""

from __future__ import annotations

import datetime
import math
import re
import sys
from typing import Any

from pydantic_core import CoreSchema, PydanticCustomError, SchemaValidator, core_schema

from dspy_bridge.errors import InvalidArgs, short
from dspy_bridge.signatures.json_schema import patterns

# Descriptive keywords, which do not constrain values.
DESCRIPTIVE = frozenset(("title", "description", "default", "examples"))
_ROOT = frozenset(("$schema", "$id", "$comment", "$defs", "definitions"))
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format")
# Type to its keywords.
FOR: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": _NUMBERS,
    "number": _NUMBERS,
    "boolean": (),
    "null": (),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "object": ("properties", "required", "additionalProperties"),
}
# Keywords that exclude others, except for those listed and the descriptive ones. The first one present counts.
_HEADS = {"$ref": (), "allOf": (), "anyOf": (), "oneOf": (), "enum": ("type",), "const": ("type",)}
_KNOWN = ("type", *_HEADS, *dict.fromkeys(word for group in FOR.values() for word in group), *sorted(DESCRIPTIVE))

_DATE = r"(\d{4}-\d\d-\d\d)"
_TIME = r"(\d\d:\d\d:\d\d)(?:\.\d+)?(?:[Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)?"
_HEX = "[0-9a-fA-F]"
# The formats that are validated; values stay strings. Others are only shown to the LM.
_FORMATS = {
    "date": re.compile(_DATE, re.ASCII),
    "time": re.compile(_TIME, re.ASCII),
    "date-time": re.compile(f"{_DATE}[Tt ]{_TIME}", re.ASCII),
    "uuid": re.compile(f"{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}"),
}


def step(word: str, name: str) -> str:
    """A step of the path in an error: `.properties.x`."""
    return f".{word}.{name}" if name.isidentifier() and len(name) <= 60 else f".{word}[{short(name)}]"


def check(schema: dict[str, Any], where: str, is_root: bool) -> None:
    """Check the keywords of one schema. Raises `InvalidArgs` for one that is unknown or excluded by another."""
    given = [word for word in schema if word not in DESCRIPTIVE and not (is_root and word in _ROOT)]
    for word in given:
        if word not in _KNOWN:
            expected = ", ".join(_KNOWN)
            where_only = "; it belongs to the root of the schema" if word in _ROOT else ""
            raise InvalidArgs(f"{where}: unknown word {short(word)}{where_only}; expected {expected}")
    head = next((word for word in _HEADS if word in schema), None)
    for word in given if head else ():
        if word != head and word not in _HEADS[head or ""]:
            raise InvalidArgs(
                f"{where}: {word} cannot be combined with {head}; put one of them into the other's schemas"
            )
    for word in ("title", "description"):
        if not isinstance(schema.get(word, ""), str):
            raise InvalidArgs(f"{where}.{word}: expected text")
    if not isinstance(schema.get("examples", []), list):
        raise InvalidArgs(f"{where}.examples: expected a list")


def kinds(schema: dict[str, Any], where: str) -> list[str]:
    """The types of a schema; without `type` the one of its keywords, if any. Raises `InvalidArgs`."""
    given = schema.get("type")
    wanted: list[Any] = given if isinstance(given, list) else [given]
    words = [word for word in schema if any(word in group for group in FOR.values())]
    if "type" not in schema:
        wanted = [kind for kind in ("object", "array", "string", "number") if set(words) & set(FOR[kind])][:1]
    elif not wanted or any(not isinstance(kind, str) or kind not in FOR for kind in wanted):
        raise InvalidArgs(f"{where}.type: expected one or more of {', '.join(FOR)}")
    elif len(set(wanted)) < len(wanted):
        raise InvalidArgs(f"{where}.type: a type is there twice")
    for word in words:
        if not any(word in FOR[kind] for kind in wanted):
            fitting = " or ".join(kind for kind, group in FOR.items() if word in group)
            raise InvalidArgs(f"{where}.{word}: goes with the type {fitting}, not with {', '.join(wanted)}")
    return wanted


def values(schema: dict[str, Any], where: str) -> list[Any]:
    """The values of `enum` or `const`. Raises `InvalidArgs`."""
    word = "enum" if "enum" in schema else "const"
    found = schema["enum"] if word == "enum" else [schema["const"]]
    if not isinstance(found, list) or not found:
        raise InvalidArgs(f"{where}.enum: expected a list of values")
    for n, value in enumerate(found):
        if value is not None and not isinstance(value, (str, int, float)):
            place = f"[{n}]" if word == "enum" else ""
            raise InvalidArgs(f"{where}.{word}{place}: expected text, a number, a boolean or null")
    if len({(isinstance(value, bool), value) for value in found}) < len(found):
        raise InvalidArgs(f"{where}.enum: a value is there twice")
    return found


def properties(schema: dict[str, Any], where: str) -> tuple[dict[str, Any], frozenset[str]]:
    """The properties of an object, and the required names. Raises `InvalidArgs`."""
    named = schema.get("properties", {})
    if not isinstance(named, dict):
        raise InvalidArgs(f"{where}.properties: expected an object of schemas by name")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InvalidArgs(f"{where}.required: expected a list of names")
    for n, name in enumerate(required):
        if name not in named:
            raise InvalidArgs(f"{where}.required[{n}]: {short(name)} is not a property")
    if len(set(required)) < len(required):
        raise InvalidArgs(f"{where}.required: a name is there twice")
    return named, frozenset(required)


def flag(schema: dict[str, Any], word: str, where: str) -> bool:
    """A boolean keyword. Raises `InvalidArgs`."""
    value = schema.get(word, False)
    if not isinstance(value, bool):
        raise InvalidArgs(f"{where}.{word}: expected true or false")
    return value


def counts(schema: dict[str, Any], where: str, *names: str) -> dict[str, int]:
    """The keywords that are present, each a whole number from 0 on. Raises `InvalidArgs`."""
    found = {}
    for word in names:
        if word in schema:
            value = schema[word]
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InvalidArgs(f"{where}.{word}: expected a whole number from 0 on")
            found[word] = min(value, sys.maxsize)
    return found


def scalar(kind: str, schema: dict[str, Any], where: str) -> CoreSchema:
    """The validator of a string, a number, a boolean or null. Raises `InvalidArgs`."""
    if kind == "boolean":
        return core_schema.bool_schema()
    if kind == "null":
        return core_schema.none_schema()
    if not isinstance(schema.get("format", ""), str):
        raise InvalidArgs(f"{where}.format: expected text")
    return _text(schema, where) if kind == "string" else _number(kind, schema, where)


def _text(schema: dict[str, Any], where: str) -> CoreSchema:
    limits = counts(schema, where, "minLength", "maxLength")
    core: CoreSchema = core_schema.str_schema(min_length=limits.get("minLength"), max_length=limits.get("maxLength"))
    if "pattern" in schema:
        matcher = patterns.read(schema["pattern"], f"{where}.pattern")
        core = core_schema.with_info_after_validator_function(matcher, core)
    name = schema.get("format")
    if name not in _FORMATS:
        return core

    def has_format(text: str) -> str:
        if not _has_format(text, name):
            raise PydanticCustomError("format", "Input should be a {name}", {"name": name})
        return text

    return core_schema.no_info_after_validator_function(has_format, core)


def _has_format(text: str, name: str) -> bool:
    found = _FORMATS[name].fullmatch(text)
    if found is None or name == "uuid":
        return found is not None
    try:
        if name != "time":
            datetime.date.fromisoformat(found[1])
        if name != "date":
            datetime.time.fromisoformat(found[1 if name == "time" else 2])
    except ValueError:
        return False
    return True


def _number(kind: str, schema: dict[str, Any], where: str) -> CoreSchema:
    bounds: dict[str, Any] = {}
    names = {"minimum": "ge", "maximum": "le", "exclusiveMinimum": "gt", "exclusiveMaximum": "lt", "multipleOf": ""}
    for word, name in names.items():
        if word not in schema:
            continue
        value = schema[word]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise InvalidArgs(f"{where}.{word}: expected a number")
        if word == "multipleOf" and (value <= 0 or (kind == "integer" and value != int(value))):
            more = "a whole number" if kind == "integer" else "a number"
            raise InvalidArgs(f"{where}.multipleOf: expected {more} above 0")
        if kind == "integer" and word in ("minimum", "exclusiveMaximum"):
            value = math.ceil(value)
        elif kind == "integer":
            value = math.floor(value)
        bounds[name or "multiple_of"] = value
    if kind == "integer":
        return core_schema.int_schema(**bounds)
    core = core_schema.float_schema(**bounds, allow_inf_nan=False)
    # Converted to floats, long integers are multiples of anything.
    by_whole = schema.get("multipleOf", 1) == int(schema.get("multipleOf", 1))
    whole = SchemaValidator(_number("integer", schema, where)) if by_whole else None

    def keep_whole(value: Any, check: Any) -> Any:
        """Integers stay integers: as a float 5 would be returned as 5.0, and a long one changed."""
        if type(value) is not int:
            return check(value)
        if whole is not None:
            return whole.validate_python(value)
        check(value)
        return value

    return core_schema.no_info_wrap_validator_function(keep_whole, core)
