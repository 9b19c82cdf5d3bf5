"""Types given as JSON Schema: an LM is shown the schema itself, and `jsonschema_rs` validates the values.

Values stay plain JSON under the schema's names. LMs' answers are converted first where no information is lost, as
pydantic does: "5" to an integer, say. References are replaced by their targets, so recursive types are not supported.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union

import jsonschema_rs
import pydantic
from pydantic_core import CoreSchema, PydanticCustomError, ValidationError, core_schema

from dspy_bridge.errors import InvalidArgs, refuse_unknown, step

# Nested schemas, references followed. Far from Python's recursion limit.
MAX_DEPTH = 64
# Schemas and values of enums in all, references followed, which multiply: a few lines can mean billions. Each prompt
# has all of them: 300,000 values took 0.7 s.
MAX_SIZE = 10_000
# Different patterns in one schema, and the size of a compiled one in bytes: a program keeps at most 10 MB of them.
MAX_PATTERNS = 10
MAX_PATTERN_BYTES = 1 << 20
# Patterns match in linear time, with the GIL held: at worst 0.1 ns for each character and byte of the compiled pattern,
# so at most 0.8 s for all strings of one value.
MAX_WORK = 8 << 30

# An error may name a property, of any length.
_MOST_TEXT = 200

_OF_TYPE = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_DESCRIPTIVE = ("title", "description", "default", "examples")
_SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems")
# Others are refused: a misspelt one would be ignored, and those that are missing here could not be converted.
_OF_TYPES = tuple(word for words in _OF_TYPE.values() for word in words)
_KNOWN = ("type", "$ref", *_SEVERAL[:3], "enum", "const", *_OF_TYPES, *_DESCRIPTIVE)
_ROOT = ("$schema", "$id", "$comment", "$defs", "definitions")

# "number" is `float`, which DSPy describes best to LMs: 5 is returned as 5.0, but as 5 inside lists and objects. Unless
# the type is only `str`, DSPy parses a string of an LM's answer as JSON before it is validated: with
# {"type": ["string", "integer"]}, "5" becomes 5 and "[1]" is refused. Only an adapter could change that.
_SCALARS: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)}
_PYTHONS: dict[str, Any] = {**_SCALARS, "number": (int, float), "array": list, "object": dict}
_LAX = {kind: pydantic.TypeAdapter(python) for kind, python in {**_PYTHONS, "number": float}.items()}


def to_annotation(schema: dict[str, Any], where: str) -> Any:
    """The annotation for a JSON Schema object. Raises `InvalidArgs`, which names the place in it.

    Python's own type where there is one (`str`, `Literal[…]`, `Optional[int]`), as DSPy supports these best: plain, or
    `Annotated` with further constraints. Else a new class.
    """
    made = _Schema(schema, where)
    shown = made.shown
    shape = type(_name_of(shown), (_Shape,), {"validate": made.validate, "shown": json.dumps(shown)})
    try:
        pydantic.TypeAdapter(shape).json_schema()
    except Exception as error:  # pydantic follows any "$ref", even in data
        raise InvalidArgs(f"{where}: cannot be shown to an LM: {type(error).__name__}") from None
    plain, whole = _plain(shown)
    return shape if plain is None else plain if whole else Annotated[plain, shape]


class _Shape:
    """A type with the validator of a schema. As metadata of `Annotated` it replaces the type's own validation."""

    validate: Any
    shown: str

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.validate)

    @classmethod
    def __get_pydantic_json_schema__(cls, _core: CoreSchema, _handler: Any) -> Any:
        return json.loads(cls.shown)  # a copy: pydantic and DSPy modify it


class _Schema:
    """One schema: `shown` to LMs, with references followed; validates values."""

    def __init__(self, root: dict[str, Any], where: str) -> None:
        """Raises `InvalidArgs`."""
        self._root = root
        self._where = where
        self._size = 0
        # How many characters a value's strings may have for each pattern.
        self._patterns: dict[str, int] = {}
        self._validators: dict[int, jsonschema_rs.Validator] = {}
        # The metaschema is recursive. Frames have at most 200 levels; 500 would overflow a stack of 512 KB.
        wrong = next(iter(_METASCHEMA.iter_errors(root)), None)
        if wrong is not None:
            place = "".join(map(step, wrong.instance_path))
            text = f"expected one or more of {', '.join(_PYTHONS)}" if place.endswith(".type") else wrong.message
            raise InvalidArgs(f"{where}{place}: {text}")
        self.shown: dict[str, Any] = self._read(root, where, 0)
        self._fits(None, self.shown)

    def validate(self, value: Any) -> Any:
        """The value, converted. Raises pydantic's `ValidationError`."""
        made = self._lax(value, self.shown, dict(self._patterns))
        try:
            self._validators[id(self.shown)].validate(made)
        except jsonschema_rs.ValidationError as error:
            found: Any = error
            while found.kind.name == "anyOf":  # for a value or null, what is wrong with the value
                others = [one[0] for one in found.kind.context if one[0].kind.as_dict() != {"types": ["null"]}]
                if len(others) != 1:
                    break
                found = others[0]
            wrong = PydanticCustomError("json_schema", "{text}", {"text": found.message[:_MOST_TEXT]})
            at = tuple(found.instance_path)
            raise ValidationError.from_exception_data("", [{"type": wrong, "loc": at, "input": None}]) from None
        return made

    def _read(self, schema: Any, where: str, depth: int) -> Any:
        """A schema with references followed, and with the type that its keywords imply."""
        self._size += 1
        if depth > MAX_DEPTH:
            limit = f"expected at most {MAX_DEPTH} schemas inside each other"
            raise InvalidArgs(f"{where}: nested too deep, or recursive, which is not supported; {limit}")
        if isinstance(schema, bool):
            return {} if schema else False
        refuse_unknown(schema, (*_KNOWN, *_ROOT) if schema is self._root else _KNOWN, where)
        self._size += len(schema.get("enum", ()))
        if self._size > MAX_SIZE:
            raise InvalidArgs(f"{self._where}: too large; expected at most {MAX_SIZE} schemas and values of enums")
        made = {word: schema[word] for word in schema if word not in _ROOT}
        if "$ref" in made:
            made = self._followed(made.pop("$ref"), made, where, depth)
        if "oneOf" in made and "anyOf" not in made:
            made["anyOf"] = made.pop("oneOf")
        for word in ("items", "additionalProperties"):
            if word in schema:
                made[word] = self._read(schema[word], f"{where}.{word}", depth + 1)
        for word in _SEVERAL:
            if word in made and "$ref" not in schema:
                made[word] = [self._read(one, f"{where}.{word}[{n}]", depth + 1) for n, one in enumerate(made[word])]
        if "properties" in schema:
            at = f"{where}.properties"
            named = schema["properties"].items()
            made["properties"] = {name: self._read(one, at + step(name), depth + 1) for name, one in named}
        if "prefixItems" in made and "items" not in made:
            made["minItems"] = made["maxItems"] = len(made["prefixItems"])
        if not made.keys() & {"type", "anyOf", "allOf", "enum", "const"}:
            kind = next((kind for kind, words in _OF_TYPE.items() if made.keys() & set(words)), None)
            made.update({} if kind is None else {"type": kind})
        if "pattern" in made and made["pattern"] not in self._patterns:
            self._patterns[made["pattern"]] = _longest(made["pattern"], f"{where}.pattern")
            if len(self._patterns) > MAX_PATTERNS:
                raise InvalidArgs(f"{self._where}: expected at most {MAX_PATTERNS} different patterns")
        if "default" in made and not _compiled(made, where).is_valid(made["default"]):
            raise InvalidArgs(f"{where}.default: does not fit the type that it is for")
        return made

    def _followed(self, reference: str, beside: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
        _, word, name = reference.split("/") if reference.count("/") == 2 else ("", "", "")
        if word not in ("$defs", "definitions") or not reference.startswith("#"):
            raise InvalidArgs(f'{where}.$ref: expected "#/$defs/NAME": a definition in the same schema')
        name = name.replace("~1", "/").replace("~0", "~")
        definitions = self._root.get(word, {})
        if name not in definitions:
            raise InvalidArgs(f"{where}.$ref: there is no {word}{step(name)}")
        if others := [word for word in beside if word not in _DESCRIPTIVE]:
            raise InvalidArgs(f"{where}: {others[0]} cannot be combined with $ref; put it into the definition")
        target = self._read(definitions[name], f"{self._where}.{word}{step(name)}", depth + 1)
        return {**target, **beside} if isinstance(target, dict) else {"allOf": [target], **beside}

    def _fits(self, value: Any, schema: Any) -> bool:
        """Whether a value is valid as it is for a part of `shown`, which must stay alive: the cache has its id."""
        validator = self._validators.get(id(schema))
        if validator is None:
            validator = self._validators[id(schema)] = _compiled(schema, self._where)
        return validator.is_valid(value)

    def _lax(self, value: Any, schema: Any, left: dict[str, int]) -> Any:
        """The value converted to what the schema wants, as far as that is clear. `left`: characters, by pattern."""
        if not schema:
            return value
        if "anyOf" in schema:
            value = self._branch(value, schema["anyOf"], left)
        for one in schema.get("allOf", ()):
            value = self._lax(value, one, left)
        value = _converted(value, schema.get("type", ()))
        if isinstance(value, dict):
            return self._object(value, schema, left)
        if isinstance(value, list):
            first, rest = schema.get("prefixItems", ()), schema.get("items", {})
            return [self._lax(item, first[n] if n < len(first) else rest, left) for n, item in enumerate(value)]
        if isinstance(value, str) and "pattern" in schema:
            left[schema["pattern"]] -= len(value)
            if left[schema["pattern"]] < 0:
                raise PydanticCustomError("pattern_work", "Input is too long for its pattern")
        return value

    def _branch(self, value: Any, choices: list[Any], left: dict[str, int]) -> Any:
        """The value as the first choice that it fits has it; if there is none, as the first that it can be made fit."""
        # First of all, as this counts the characters that patterns will match.
        made = [self._lax(value, choice, left) for choice in choices]
        for tried in ([value] * len(choices), made):
            for one, choice, result in zip(tried, choices, made, strict=True):
                if self._fits(one, choice):
                    return result
        return value

    def _object(self, value: dict[str, Any], schema: dict[str, Any], left: dict[str, int]) -> dict[str, Any]:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        required = set(schema.get("required", ()))
        made = {}
        for name, item in value.items():
            if item is None and name in properties and name not in required and not self._fits(None, properties[name]):
                continue  # LMs and Elixir structs write null for absent values
            made[name] = self._lax(item, properties.get(name, others), left)
        for name, one in properties.items():
            if name not in made and name not in required and isinstance(one, dict) and "default" in one:
                made[name] = copy.deepcopy(one["default"])
        return made


_METASCHEMA = jsonschema_rs.validator_for({"$ref": "https://json-schema.org/draft/2020-12/schema"}, mask="the value")


def _maybe_without_zone(format: str) -> Callable[[str], bool]:
    """The check of a time's format, which wants a zone: Elixir's naive ones have none."""
    strict = jsonschema_rs.validator_for({"format": format}, validate_formats=True)
    return lambda text: strict.is_valid(text) or strict.is_valid(f"{text}Z")


_FORMATS = {format: _maybe_without_zone(format) for format in ("date-time", "time")}


def _compiled(schema: Any, where: str, size: int = MAX_PATTERN_BYTES) -> jsonschema_rs.Validator:
    limits = jsonschema_rs.RegexOptions(size_limit=size, dfa_size_limit=MAX_PATTERN_BYTES)
    try:
        return jsonschema_rs.Draft202012Validator(
            schema,
            formats=_FORMATS,
            validate_formats=True,
            mask="the value",
            pattern_options=limits,
            offline=True,
        )
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
        raise InvalidArgs(f"{where}: {error.message if hasattr(error, 'message') else error}") from None


def _longest(pattern: str, where: str) -> int:
    """How many characters all strings of a value may have for their pattern."""
    for size in (MAX_PATTERN_BYTES >> 5, MAX_PATTERN_BYTES >> 2, MAX_PATTERN_BYTES):
        try:
            _compiled({"pattern": pattern}, where, size)
        except InvalidArgs:
            continue
        return MAX_WORK // size
    unread = "cannot be read, or is too large; expected a regular expression without look-around and back references"
    raise InvalidArgs(f"{where}: {unread}")


def _converted(value: Any, types: Any) -> Any:
    """The value as one of the types, if it has none of them and there is one way to read it."""
    types = [types] if isinstance(types, str) else types
    if not isinstance(value, (bool, *(_PYTHONS[kind] for kind in types))):
        for kind in types:
            try:
                return _LAX[kind].validate_python(value)
            except ValidationError:
                pass
    return value


def _name_of(shown: dict[str, Any]) -> str:
    """The type's name, which is in DSPy's prompts: the title, or Python's name."""
    title = "".join(filter(str.isalnum, shown.get("title", "")))[:60]
    return title if title.isidentifier() else {"object": "dict", "array": "list"}.get(str(shown.get("type")), "JSON")


def _plain(shown: Any) -> tuple[Any, bool]:
    """Python's own type for a schema, or None; and whether it expresses all of the schema."""
    if not isinstance(shown, dict):
        return None, False
    if shown.keys() <= set(_DESCRIPTIVE):
        return Any, "examples" not in shown
    whole = shown.keys() <= {"type", "enum", "const", "anyOf", "title", "description", "default"}
    if "enum" in shown or "const" in shown:
        values = shown.get("enum", [shown.get("const")])
        fit = values and all(value is None or isinstance(value, (str, int)) for value in values)
        return Literal[tuple(values)] if fit else None, whole
    kinds = shown.get("type", [])
    # DSPy must know maps, which cannot be requested as structured output.
    types = _SCALARS if "properties" in shown else {**_SCALARS, "object": dict[str, Any]}
    members = [types.get(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])]
    for choice in shown.get("anyOf", ()):
        member, of_member = _plain(choice)
        members.append(member)
        whole = whole and of_member
    if not members or None in members or Any in members:
        return None, False
    return Union[tuple(members)], whole  # noqa: UP007 - built from values
