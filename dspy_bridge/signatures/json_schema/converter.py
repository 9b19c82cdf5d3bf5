"""Converts a JSON Schema to a pydantic-core schema, and to the JSON Schema that an LM is shown.

Values stay plain JSON: objects are dicts with the schema's names, and an absent property stays absent unless it has a
default. References are replaced by their targets, so recursive schemas are refused.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pydantic
from pydantic_core import CoreSchema, PydanticCustomError, SchemaValidator, core_schema

from dspy_bridge.errors import InvalidArgs, short
from dspy_bridge.signatures.json_schema import keywords, patterns

# Nested schemas, references followed. Far from Python's recursion limit, with five frames a level.
MAX_DEPTH = 64
# Schemas in all, references followed, which multiply: a few lines can mean billions. 10,000 take 0.4 s.
MAX_SCHEMAS = 10_000
# Enum values in all, references followed. Each prompt has them: 300,000 take 0.7 s.
MAX_VALUES = 10_000

# The validator's schema, and the schema for the LM.
Part = tuple[CoreSchema, dict[str, Any]]


def convert(schema: dict[str, Any], where: str) -> Part:
    """Converts a whole schema. Raises `InvalidArgs`, which names the place in it."""
    return _Converter(schema, where).convert(schema, where, 0)


class _Converter:
    def __init__(self, root: dict[str, Any], where: str) -> None:
        self._root = root
        self._where = where
        self._count = 0
        self._values = 0
        self._following: list[str] = []
        self._patterns: set[str] = set()

    def convert(self, schema: object, where: str, depth: int) -> Part:
        """Converts one schema. Raises `InvalidArgs`."""
        self._count += 1
        if depth > MAX_DEPTH:
            raise InvalidArgs(f"{where}: nested too deep; expected at most {MAX_DEPTH} schemas inside each other")
        if self._count > MAX_SCHEMAS:
            raise InvalidArgs(f"{self._where}: too large; expected at most {MAX_SCHEMAS} schemas, references followed")
        if schema is True:
            return core_schema.any_schema(), {}
        if schema is False:
            raise InvalidArgs(f"{where}: false fits no value; expected a schema")
        if not isinstance(schema, dict):
            raise InvalidArgs(f"{where}: expected a JSON Schema object")
        keywords.check(schema, where, is_root=schema is self._root)
        if "pattern" in schema:
            self._patterns.add(str(schema["pattern"]))
        if len(self._patterns) > patterns.MOST:
            raise InvalidArgs(f"{self._where}: expected at most {patterns.MOST} different patterns")
        described = {word: schema[word] for word in schema if word in keywords.DESCRIPTIVE}
        if "$ref" in schema:
            core, shown = self._follow(schema["$ref"], where, depth)
        elif "allOf" in schema:
            core, shown = self._only_one(schema["allOf"], f"{where}.allOf", depth)
        elif "anyOf" in schema or "oneOf" in schema:
            core, shown = self._any_of(schema, where, depth)
        elif "enum" in schema or "const" in schema:
            core, shown = self._one_value(schema, where)
        else:
            core, shown = self._typed(schema, where, depth)
        if schema is self._root:
            self._check_definitions(depth)
        shown = {**shown, **described}
        if "default" in described and not _fits(core, described["default"]):
            raise InvalidArgs(f"{where}.default: does not fit the type that it is for")
        return core, shown

    def _check_definitions(self, depth: int) -> None:
        for word in ("$defs", "definitions"):
            definitions = self._root.get(word, {})
            if not isinstance(definitions, dict):
                raise InvalidArgs(f"{self._where}.{word}: expected an object of schemas by name")
            for name in definitions:
                self._follow(f"#/{word}/{name.replace('~', '~0').replace('/', '~1')}", self._where, depth)

    def _follow(self, reference: object, where: str, depth: int) -> Part:
        found = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", reference) if isinstance(reference, str) else None
        if found is None:
            raise InvalidArgs(f'{where}.$ref: expected "#/$defs/NAME": a definition in the same schema')
        word, name = found[1], found[2].replace("~1", "/").replace("~0", "~")
        definitions = self._root.get(word)
        if not isinstance(definitions, dict) or name not in definitions:
            raise InvalidArgs(f"{where}.$ref: there is no {keywords.step(word, name)[1:]}")
        if reference in self._following:
            raise InvalidArgs(f"{where}.$ref: a type that contains itself cannot be had; expected no cycle")
        self._following.append(str(reference))
        try:
            return self.convert(definitions[name], f"{self._where}{keywords.step(word, name)}", depth + 1)
        finally:
            self._following.pop()

    def _only_one(self, members: object, where: str, depth: int) -> Part:
        if not isinstance(members, list) or len(members) != 1:
            raise InvalidArgs(f"{where}: expected a list of one schema; write several as one object")
        return self.convert(members[0], f"{where}[0]", depth + 1)

    def _any_of(self, schema: dict[str, Any], where: str, depth: int) -> Part:
        word = "anyOf" if "anyOf" in schema else "oneOf"
        members = schema[word]
        if not isinstance(members, list) or not members:
            raise InvalidArgs(f"{where}.{word}: expected a list of schemas")
        parts = [self.convert(member, f"{where}.{word}[{n}]", depth + 1) for n, member in enumerate(members)]
        return _union([core for core, _ in parts]), {"anyOf": [shown for _, shown in parts]}

    def _one_value(self, schema: dict[str, Any], where: str) -> Part:
        values = keywords.values(schema, where)
        self._values += len(values)
        if self._values > MAX_VALUES:
            raise InvalidArgs(f"{where}.enum: expected at most {MAX_VALUES} values of enums, references followed")
        if "type" in schema:
            kinds = keywords.kinds(schema, where)
            allowed = _union([self._kind(kind, {}, where, 0)[0] for kind in kinds])
            for value in values:
                if not _fits(allowed, value):
                    raise InvalidArgs(f"{where}.type: {short(json.dumps(value))} does not have that type")
        return core_schema.literal_schema(values), {
            word: schema[word] for word in ("type", "enum", "const") if word in schema
        }

    def _typed(self, schema: dict[str, Any], where: str, depth: int) -> Part:
        kinds = keywords.kinds(schema, where)
        if not kinds:
            return core_schema.any_schema(), {}
        shown: dict[str, Any] = {"type": kinds if len(kinds) > 1 else kinds[0]}
        cores = []
        for kind in kinds:
            core, more = self._kind(kind, schema, where, depth)
            cores.append(core)
            shown.update(more)
        return _union(cores), shown

    def _kind(self, kind: str, schema: dict[str, Any], where: str, depth: int) -> Part:
        if kind == "object":
            return self._object(schema, where, depth)
        if kind == "array":
            return self._array(schema, where, depth)
        shown = {word: schema[word] for word in keywords.FOR[kind] if word in schema}
        return keywords.scalar(kind, schema, where), shown

    def _array(self, schema: dict[str, Any], where: str, depth: int) -> Part:
        limits = keywords.counts(schema, where, "minItems", "maxItems")
        shown: dict[str, Any] = {word: schema[word] for word in keywords.FOR["array"] if word in schema}
        core: CoreSchema
        if "prefixItems" in schema:
            members = schema["prefixItems"]
            if not isinstance(members, list) or not members:
                raise InvalidArgs(f"{where}.prefixItems: expected a list of schemas")
            if schema.get("items", False) is not False or any(limit != len(members) for limit in limits.values()):
                raise InvalidArgs(
                    f"{where}.prefixItems: stands for exactly these {len(members)} items, no other number"
                )
            parts = [self.convert(member, f"{where}.prefixItems[{n}]", depth + 1) for n, member in enumerate(members)]
            shown["prefixItems"] = [part for _, part in parts]
            shown["minItems"] = shown["maxItems"] = len(parts)
            core = core_schema.tuple_schema([part for part, _ in parts])
            core = core_schema.no_info_after_validator_function(list, core)
        else:
            item, shown_item = self.convert(schema.get("items", True), f"{where}.items", depth + 1)
            if "items" in schema:
                shown["items"] = shown_item
            least, most = limits.get("minItems"), limits.get("maxItems")
            core = core_schema.list_schema(item, min_length=least, max_length=most, fail_fast=True)
        if keywords.flag(schema, "uniqueItems", where):
            core = core_schema.no_info_after_validator_function(_distinct, core)
        return core, shown

    def _object(self, schema: dict[str, Any], where: str, depth: int) -> Part:
        shown: dict[str, Any] = {word: schema[word] for word in keywords.FOR["object"] if word in schema}
        extra: CoreSchema | None = None
        more = schema.get("additionalProperties", True)
        if not isinstance(more, bool):
            extra, shown["additionalProperties"] = self.convert(more, f"{where}.additionalProperties", depth + 1)
        properties, required = keywords.properties(schema, where)
        if not properties and more is not False:
            return core_schema.dict_schema(core_schema.str_schema(), extra or core_schema.any_schema()), shown
        fields, nullless = {}, set()
        shown["properties"] = {}
        for name, definition in properties.items():
            part, shown_part = self.convert(definition, where + keywords.step("properties", name), depth + 1)
            shown["properties"][name] = shown_part
            if name not in required and "default" in shown_part:
                part = core_schema.with_default_schema(part, default=shown_part["default"])
            if name not in required and not _takes_null(shown_part):
                nullless.add(name)
            fields[name] = core_schema.typed_dict_field(part, required=name in required)
        core = core_schema.typed_dict_schema(
            fields, extras_schema=extra, extra_behavior="forbid" if more is False else "allow"
        )
        if not nullless:
            return core, shown

        def without_nulls(value: Any) -> Any:
            # LMs and Elixir structs write null for absent values.
            if not isinstance(value, dict):
                return value
            return {name: item for name, item in value.items() if item is not None or name not in nullless}

        return core_schema.no_info_before_validator_function(without_nulls, core), shown


def _union(cores: list[CoreSchema]) -> CoreSchema:
    if len(cores) == 1:
        return cores[0]
    others = [core for core in cores if core["type"] != "none"]
    if len(others) == 1:
        # Its errors name what does not fit, inside it too.
        return core_schema.nullable_schema(others[0])
    # One error in place of one per member.
    return core_schema.union_schema(
        list(cores), custom_error_type="any_of", custom_error_message="Input should fit one of the schema's types"
    )


def _fits(core: CoreSchema, value: Any) -> bool:
    try:
        # Strict, without conversions; as JSON, in which a list may be a tuple.
        SchemaValidator(core).validate_json(json.dumps(value), strict=True, context=patterns.Budget())
    except (pydantic.ValidationError, ValueError):
        return False
    return True


def _takes_null(shown: dict[str, Any]) -> bool:
    if "anyOf" in shown:
        return any(_takes_null(choice) for choice in shown["anyOf"])
    if "enum" in shown or "const" in shown:
        return None in shown.get("enum", [shown.get("const")])
    kinds = shown.get("type")
    return kinds is None or "null" in (kinds if isinstance(kinds, list) else [kinds])


def _distinct(items: list[Any]) -> list[Any]:
    if len({_hashable(item) for item in items}) < len(items):
        raise PydanticCustomError("unique_items", "Input should have no item twice")
    return items


def _hashable(value: Any) -> Any:
    """Equal for equal JSON values; true is not 1."""
    if isinstance(value, dict):
        return frozenset((name, _hashable(item)) for name, item in value.items())
    if isinstance(value, list):
        return tuple(_hashable(item) for item in value)
    return (bool, value) if isinstance(value, bool) else value
