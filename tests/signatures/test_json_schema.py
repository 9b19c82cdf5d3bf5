"""json_schema: valid values come back unchanged, and an error names the place in an invalid schema."""

from __future__ import annotations

import itertools
import json
import random
import re
import string
import time
from typing import Annotated, Any, Literal, get_origin

import psutil
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import SchemaError, SchemaValidator, core_schema

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.signatures import type_parser
from dspy_bridge.signatures.json_schema import converter, keywords, patterns

AT = "signature.outputs[0].type"


def check(schema: Any, value: Any) -> Any:
    """The value of a field of that type."""
    return pydantic.TypeAdapter(type_parser.read_type(schema, AT)).validate_python(value)


def shown(schema: Any) -> Any:
    """The schema that DSPy shows an LM."""
    return pydantic.TypeAdapter(type_parser.read_type(schema, AT)).json_schema()


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


INT = {"type": "integer"}
TEXT = {"type": "string"}
ODD_NAMES = ["first-name", "class", "_x", "model_config", "schema", "a b", "a_b", "", "é", "$ref", "type", "default"]


@pytest.mark.parametrize(
    ("schema", "annotation"),
    [
        (None, str),
        ("list[int]", list[int]),
        (TEXT, str),
        ({"type": "string", "description": "described elsewhere", "title": "x"}, str),
        (INT, int),
        ({"type": "number"}, float),
        ({"type": "boolean"}, bool),
        ({"type": ["string", "null"]}, str | None),
        ({"anyOf": [INT, {"type": "null"}]}, int | None),
        ({"enum": ["a", 1, True, None]}, Literal["a", 1, True, None]),
        ({"type": "string", "enum": ["a", "b"]}, Literal["a", "b"]),
        ({"const": "a"}, Literal["a"]),
        ({"$ref": "#/$defs/x", "$defs": {"x": INT}}, int),
        ({"type": "object"}, dict[str, Any]),
        ({}, Any),
    ],
)
def test_a_type_that_python_has_is_pythons_own(schema: Any, annotation: Any) -> None:
    """DSPy parses answers best for these."""
    assert type_parser.read_type(schema, AT) == annotation


def test_what_else_a_schema_asks_of_a_plain_type_is_kept_beside_it() -> None:
    annotation = type_parser.read_type({"type": "string", "minLength": 2}, AT)
    assert get_origin(annotation) is Annotated and annotation.__origin__ is str
    assert shown({"type": "string", "minLength": 2}) == {"type": "string", "minLength": 2}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd", 5, None]),
        ({"type": "string", "pattern": "^a+$"}, ["aa"], ["ab", ""]),
        (
            {"type": "string", "format": "date"},
            ["2026-02-28"],
            ["2026-02-30", "20260228", "2026-02-28x", "1700000000", "soon"],
        ),
        ({"type": "string", "format": "time"}, ["23:59:59", "10:00:00.5Z", "10:00:00+01:00"], ["25:00:00", "10:00"]),
        (
            {"type": "string", "format": "date-time"},
            ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00", "2026-01-01t00:00:00.123+02:00"],
            ["2026-01-01", "2026-13-01T00:00:00Z", "1700000000", "2026-01-01T24:61:00Z"],
        ),
        ({"type": "string", "format": "uuid"}, ["0d9c1b4e-0c4e-4c7b-9a53-1f7a3f8a1c11"], ["{0d9c}", "x"]),
        ({"type": "string", "format": "email"}, ["shown, not checked"], [5]),
        ({"type": "integer", "minimum": 0.5, "maximum": 3.5}, [1, 3], [0, 4, 1.5]),
        ({"type": "integer", "exclusiveMinimum": 0.5, "exclusiveMaximum": 3.5}, [1, 3], [0, 4]),
        ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 3}, [2], [1, 3]),
        ({"type": "integer", "multipleOf": 5.0}, [0, 10], [3]),
        (INT, [10**100, -(10**100)], ["x", 1.5, None, [], {}]),
        ({"type": "number", "minimum": 0.5, "exclusiveMaximum": 2}, [0.5, 1, 1.99], [0.4, 2, float("nan")]),
        ({"type": "number", "multipleOf": 0.1}, [0.3, 2], [0.25]),
        ({"type": "boolean"}, [True, False], ["perhaps", 2]),
        ({"type": "null"}, [None], [0]),
        ({"enum": ["a", 1, 0.5, None]}, ["a", 1, 0.5, None], ["b", 2, []]),
        ({"const": 5}, [5], [6]),
        ({"type": ["integer", "string"]}, [5, "5"], [None, []]),
        ({"type": "array", "items": INT, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3], ["x"], "1"]),
        ({"items": INT}, [[1]], [["x"]]),
        ({"type": "array"}, [[1, "a", None, {}]], [{}]),
        (
            {"type": "array", "uniqueItems": True},
            [[1, True, "1", {"a": 1}, [1]]],
            [[1, 1.0], [{"a": [1]}, {"a": [1.0]}], [True, True]],
        ),
        ({"type": "array", "prefixItems": [INT, TEXT]}, [[1, "a"]], [[1], [1, "a", 2], ["a", 1]]),
        (obj(a=INT), [{"a": 1}, {}, {"a": 1, "more": [1]}], [{"a": "x"}, [], None]),
        ({"properties": {"a": INT}, "required": ["a"]}, [{"a": 1}], [{}, {"a": None}]),
        ({**obj(a=INT), "additionalProperties": False}, [{"a": 1}, {}], [{"b": 1}]),
        ({"type": "object", "additionalProperties": False}, [{}], [{"b": 1}]),
        ({**obj(a=INT), "additionalProperties": TEXT}, [{"a": 1, "b": "x"}], [{"a": 1, "b": 2}]),
        ({"type": "object", "additionalProperties": INT}, [{"x": 1}], [{"x": "y"}, []]),
        ({"anyOf": [obj(a=INT), {"type": "null"}]}, [{"a": 1}, None], [5]),
        ({"oneOf": [INT, {"type": "array", "items": INT}]}, [5, [5]], ["x"]),
        ({"allOf": [{"type": "array", "items": INT}]}, [[5]], [["x"]]),
        ({"type": "array", "items": True}, [[1, "a"]], [5]),
        (
            {
                "$ref": "#/definitions/a~1b~0c",
                "definitions": {"a/b~c": obj(a={"$ref": "#/$defs/n"})},
                "$defs": {"n": INT},
            },
            [{"a": 1}],
            [{"a": "x"}],
        ),
    ],
)
def test_what_fits_comes_back_as_it_was_and_what_does_not_is_refused(schema: Any, good: Any, bad: Any) -> None:
    for value in good:
        assert json.dumps(check(schema, value)) == json.dumps(value)
    for value in bad:
        with pytest.raises(pydantic.ValidationError):
            check(schema, value)


def test_an_array_is_a_list_whatever_its_items() -> None:
    assert check({"type": "array", "prefixItems": [INT, TEXT]}, [1, "a"]) == [1, "a"]


def test_numbers_keep_their_kind() -> None:
    """Integers are not converted to floats: 5 and 5.0 differ in Elixir, and long ones change."""
    values = [5, 5.0, 2**60 + 1]
    assert str(check({"type": "array", "items": {"type": "number"}}, values)) == str(values)


def test_a_long_whole_number_is_a_multiple_or_none() -> None:
    """As a float it is a multiple of anything."""
    for kind in ("number", "integer"):
        schema = {"type": "array", "items": {"type": kind, "multipleOf": 3}}
        assert check(schema, [3 * 10**20, -3, 0]) == [3 * 10**20, -3, 0]
        with pytest.raises(pydantic.ValidationError):
            check(schema, [10**20])
    assert check({"type": "array", "items": {"type": "number", "multipleOf": 0.5}}, [2, 1.5]) == [2, 1.5]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_is_a_property(name: str) -> None:
    """Also invalid names in Python, and names with a meaning in pydantic."""
    schema = {**obj(**{name: INT}, other=INT), "required": [name]}
    assert check(schema, {name: 5}) == {name: 5}
    assert list(shown(schema)["properties"]) == [name, "other"] and shown(schema)["required"] == [name]
    with pytest.raises(pydantic.ValidationError):
        check(schema, {"other": 5})


def test_names_that_look_alike_are_two() -> None:
    schema = obj(**{"a-b": INT, "a_b": INT, "a b": TEXT})
    assert check(schema, {"a-b": 1, "a_b": 2, "a b": "x"}) == {"a-b": 1, "a_b": 2, "a b": "x"}


def test_what_is_absent_stays_absent_unless_it_has_a_default() -> None:
    schema = obj(nick=TEXT, tags={"type": "array", "default": ["x"]}, maybe={"type": ["string", "null"]})
    first = check(schema, {})
    assert first == {"tags": ["x"]}
    first["tags"].append("y")
    assert check(schema, {}) == {"tags": ["x"]}, "each value has a default of its own"


def test_null_for_an_optional_property_is_as_absent_where_null_is_no_value() -> None:
    """LMs and Elixir's structs write it so. Where null is valid, it stays."""
    schema = {**obj(nick=TEXT, n={"type": "integer", "default": 3}, maybe={"type": ["string", "null"]}, any=True)}
    assert check(schema, {"nick": None, "n": None, "maybe": None, "any": None}) == {"n": 3, "maybe": None, "any": None}
    with pytest.raises(pydantic.ValidationError):
        check({**obj(nick=TEXT), "required": ["nick"]}, {"nick": None})
    for nullable in ({"enum": ["a", None]}, {"const": None}, {"anyOf": [TEXT, {"type": "null"}]}, {}):
        assert check(obj(a=nullable), {"a": None}) == {"a": None}


def test_an_lm_is_shown_the_schema_itself_with_references_followed() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "x",
        "$comment": "x",
        "type": "object",
        "title": "A person",
        "description": "someone",
        "properties": {
            "first-name": {"type": "string", "description": "given", "examples": ["Ada"], "pattern": "^[A-Z]"},
            "mood": {"enum": ["good", "bad"], "default": "good"},
            "friend": {"$ref": "#/$defs/Friend", "description": "the best one"},
            "pets": {"type": "array", "items": {"oneOf": [TEXT, {"$ref": "#/$defs/Friend"}]}, "uniqueItems": True},
        },
        "required": ["first-name"],
        "additionalProperties": False,
        "$defs": {"Friend": {"type": "object", "description": "a friend", "properties": {"since": {"format": "date"}}}},
    }
    friend = {
        "type": "object",
        "description": "a friend",
        "properties": {"since": {"type": "string", "format": "date"}},
    }
    assert shown(schema) == {
        "type": "object",
        "title": "A person",
        "description": "someone",
        "properties": {
            **schema["properties"],
            "friend": {**friend, "description": "the best one"},
            "pets": {"type": "array", "items": {"anyOf": [TEXT, friend]}, "uniqueItems": True},
        },
        "required": ["first-name"],
        "additionalProperties": False,
    }
    assert type_parser.read_type(schema, AT).__name__ == "Aperson"
    assert type_parser.read_type(obj(a=INT), AT).__name__ == "dict"


CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": obj(b={"$ref": "#/$defs/b"}), "b": {"items": {"$ref": "#/$defs/a"}}}}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (obj(x={"foo": 1}), ".properties.x: unknown word 'foo'; expected type, $ref"),
        ({"type": "string", "nullable": True}, ": unknown word 'nullable'"),
        (obj(x={"$defs": {}}), ".properties.x: unknown word '$defs'; it belongs to the root"),
        (obj(**{"a b": 5}), ".properties['a b']: expected a JSON Schema object"),
        ({"type": 5}, ".type: expected one or more of string, integer"),
        ({"type": "text"}, ".type: expected one or more of string, integer"),
        ({"type": []}, ".type: expected one or more"),
        ({"type": ["string", "string"]}, ".type: a type is there twice"),
        ({"type": ["string", {}]}, ".type: expected one or more"),
        ({"type": None}, ".type: expected one or more"),
        ({"type": "object", "properties": []}, ".properties: expected an object of schemas by name"),
        ({"type": "object", "required": "x"}, ".required: expected a list of names"),
        ({"type": "object", "required": [5]}, ".required: expected a list of names"),
        ({**obj(a=INT), "required": ["a", "z"]}, ".required[1]: 'z' is not a property"),
        ({**obj(a=INT), "required": ["a", "a"]}, ".required: a name is there twice"),
        ({"type": "object", "additionalProperties": 5}, ".additionalProperties: expected a JSON Schema object"),
        ({"enum": []}, ".enum: expected a list of values"),
        ({"enum": "a"}, ".enum: expected a list of values"),
        ({"enum": ["a", {}]}, ".enum[1]: expected text, a number, a boolean or null"),
        ({"enum": ["a", "a"]}, ".enum: a value is there twice"),
        ({"enum": [1, 1.0]}, ".enum: a value is there twice"),
        ({"const": []}, ".const: expected text, a number, a boolean or null"),
        ({"type": "integer", "enum": ["a"]}, ".type: '\"a\"' does not have that type"),
        ({"enum": ["a"], "minLength": 3}, ": minLength cannot be combined with enum"),
        ({"type": "integer", "minLength": 3}, ".minLength: goes with the type string, not with integer"),
        ({"minLength": 3, "items": {}}, ".minLength: goes with the type string, not with array"),
        ({"type": "string", "minLength": -1}, ".minLength: expected a whole number from 0 on"),
        ({"type": "string", "minLength": True}, ".minLength: expected a whole number"),
        ({"type": "string", "pattern": "("}, ".pattern: cannot be read"),
        ({"type": "string", "pattern": "(?=a)"}, ".pattern: cannot be read"),
        ({"type": "string", "pattern": "((a{1000}){1000}){1000}"}, ".pattern: too large"),
        ({"type": "string", "pattern": "a" * 1001}, ".pattern: expected at most 1000 characters"),
        ({"type": "string", "pattern": None}, ".pattern: cannot be read"),
        ({"type": "string", "format": 5}, ".format: expected text"),
        ({"type": "integer", "minimum": "0"}, ".minimum: expected a number"),
        ({"type": "integer", "minimum": True}, ".minimum: expected a number"),
        ({"type": "number", "minimum": 10**400}, ".minimum: expected a number"),
        ({"type": "number", "multipleOf": 0}, ".multipleOf: expected a number above 0"),
        ({"type": "integer", "multipleOf": 0.5}, ".multipleOf: expected a whole number above 0"),
        ({"type": "array", "items": [INT]}, ".items: expected a JSON Schema object"),
        ({"type": "array", "items": False}, ".items: false fits no value"),
        ({"type": "array", "uniqueItems": 1}, ".uniqueItems: expected true or false"),
        ({"type": "array", "minItems": 1.5}, ".minItems: expected a whole number"),
        ({"type": "array", "prefixItems": {}}, ".prefixItems: expected a list of schemas"),
        ({"type": "array", "prefixItems": [INT], "items": INT}, ".prefixItems: stands for exactly these"),
        ({"type": "array", "prefixItems": [INT], "minItems": 0}, ".prefixItems: stands for exactly these"),
        ({"anyOf": []}, ".anyOf: expected a list of schemas"),
        ({"oneOf": {}}, ".oneOf: expected a list of schemas"),
        ({"anyOf": [INT], "type": "string"}, ": type cannot be combined with anyOf"),
        ({"anyOf": [INT, {"foo": 1}]}, ".anyOf[1]: unknown word 'foo'"),
        ({"allOf": [INT, INT]}, ".allOf: expected a list of one schema"),
        ({"$ref": 5}, '.$ref: expected "#/$defs/NAME"'),
        ({"$ref": "#"}, '.$ref: expected "#/$defs/NAME"'),
        ({"$ref": "http://example.org/x.json"}, '.$ref: expected "#/$defs/NAME"'),
        ({"$ref": "file:///etc/passwd"}, '.$ref: expected "#/$defs/NAME"'),
        ({"$ref": "#/$defs/x"}, ".$ref: there is no $defs.x"),
        ({"$ref": "#/$defs/x", "$defs": {"x": INT}, "minimum": 1}, ": minimum cannot be combined with $ref"),
        (CYCLE, ".$defs.b.items.$ref: a type that contains itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, ".$defs.a.$ref: a type that contains itself"),
        ({"type": "string", "$defs": {"x": {"foo": 1}}}, ".$defs.x: unknown word 'foo'"),
        ({"type": "string", "$defs": []}, ".$defs: expected an object of schemas by name"),
        ({"type": "string", "default": 5}, ".default: does not fit"),
        ({"type": "integer", "default": "5"}, ".default: does not fit"),
        (obj(x={"type": "array", "items": INT, "default": ["x"]}), ".properties.x.default: does not fit"),
        ({"type": "string", "description": 5}, ".description: expected text"),
        ({"type": "string", "title": []}, ".title: expected text"),
        ({"type": "string", "examples": "x"}, ".examples: expected a list"),
        (5, ": expected text such as str, list[int]"),
        ([], ": expected text such as str, list[int]"),
        (True, ": expected text such as str, list[int]"),
        ({"type": "string", "default": {"$ref": "#/$defs/x"}}, ".default: does not fit"),
        ({"default": {"$ref": "#/$defs/x"}}, ": cannot be shown to an LM"),
    ],
)
def test_what_is_no_schema_is_refused_and_the_place_named(schema: Any, text: str) -> None:
    with pytest.raises(InvalidArgs) as caught:
        type_parser.read_type(schema, AT)
    assert str(caught.value).startswith(AT + text), str(caught.value)


def nested(word: str, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner: Any = {"x": schema} if word == "properties" else [schema] if word == "anyOf" else schema
        schema = {word: inner}
    return schema


@pytest.mark.parametrize("word", ["properties", "anyOf", "allOf", "items", "additionalProperties", "default"])
def test_a_schema_10000_deep_is_refused_at_once(word: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidArgs, match="nested too deep"):
        type_parser.read_type(nested(word, 10_000), AT)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("word", ["properties", "anyOf", "items", "additionalProperties"])
def test_the_deepest_schema_works_and_one_deeper_is_refused(word: str) -> None:
    assert shown(nested(word, converter.MAX_DEPTH))
    with pytest.raises(InvalidArgs, match=f"at most {converter.MAX_DEPTH} schemas inside"):
        type_parser.read_type(nested(word, converter.MAX_DEPTH + 1), AT)


def test_references_that_multiply_are_refused_at_once() -> None:
    """Twenty definitions, each with two references to the next, are a million schemas."""
    definitions = {f"d{n}": obj(a={"$ref": f"#/$defs/d{n + 1}"}, b={"$ref": f"#/$defs/d{n + 1}"}) for n in range(20)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**definitions, "d20": INT}}
    began = time.monotonic()
    with pytest.raises(InvalidArgs, match=f"{re.escape(AT)}: too large; expected at most 10000 schemas"):
        type_parser.read_type(schema, AT)
    assert time.monotonic() - began < 5


def test_a_chain_of_references_too_deep_is_refused() -> None:
    definitions = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(5000)}
    with pytest.raises(InvalidArgs, match="nested too deep"):
        type_parser.read_type({"$ref": "#/$defs/d0", "$defs": {**definitions, "d5000": INT}}, AT)


def test_a_wide_schema_works_in_bounded_time() -> None:
    began = time.monotonic()
    schema = obj(**{f"p{n}": {"type": "string", "default": "x"} for n in range(9000)})
    assert len(check(schema, {})) == 9000
    assert time.monotonic() - began < 5


def test_patterns_that_cost_much_are_few_and_bounded() -> None:
    """Equal patterns are compiled once."""
    same = obj(**{f"p{n}": {"type": "string", "pattern": r"^\w{80}$"} for n in range(200)})
    began = time.monotonic()
    assert check(same, {"p7": "x" * 80}) and time.monotonic() - began < 1
    many = obj(**{f"p{n}": {"type": "string", "pattern": f"^{n}"} for n in range(patterns.MOST)})
    assert check(many, {"p7": "7up"})
    many["properties"]["more"] = {"type": "string", "pattern": "x"}
    with pytest.raises(InvalidArgs, match="at most 10 different patterns"):
        type_parser.read_type(many, AT)


def test_an_enum_is_no_dictionary() -> None:
    """Each prompt has all values: 300,000 held the event loop for 0.7 s."""
    many = [f"v{n}" for n in range(converter.MAX_VALUES)]
    assert check({"enum": many}, "v5") == "v5"
    expected = f"expected at most {converter.MAX_VALUES} values of enums"
    with pytest.raises(InvalidArgs, match=re.escape(f"{AT}.properties.x.enum: {expected}")):
        check({"properties": {"x": {"enum": [*many, "more"]}}}, {})


def test_the_values_of_all_enums_count_together() -> None:
    some = {"enum": [f"v{n}" for n in range(converter.MAX_VALUES // 2)]}
    schema = {"$defs": {"some": some}, "type": "array", "prefixItems": [{"$ref": "#/$defs/some"}] * 2}
    with pytest.raises(InvalidArgs, match=re.escape(f"{AT}.$defs.some.enum: expected at most")):
        check(schema, ["v1", "v2"])


@pytest.mark.parametrize(
    "pattern",
    [
        r"\p{Greek}{20}\pL{2}",
        r"(?i:\PL){20}",
        "(a{100}){100}",
        "a{7000}",
        "(?i)a{4000}",
        ".{2000}",
        r"\S{800}",
        "(?:x{0,60}){150,}",
        r"[](]\p{L}{20}",
        r"(\p{L}\p{L}[](])?{10}",
        r"(?P<n>\w{20}){200}",
        "((((.{8}){8}){8}){8})",
        r"(?x) \p{L} {20}",
        "a{99999999999999999999}",
    ],
)
def test_a_pattern_that_would_be_large_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidArgs, match=r"\.pattern: too large"):
        type_parser.read_type({"type": "string", "pattern": pattern}, AT)


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^[\w.+-]{1,64}@[\w-]{1,63}\.\w{2,24}$", "ada@example.org", "ada"),
        (r"^[\w\s.,'-]{1,500}$", "Ada, nee", ""),
        (r"^\w+$", "Ada_1", "é"),
        (r"^\W+[^\w]+[^\W_]\D$", "é, 1x", "a"),
        (r"^\d+$", "12", "१२"),
        (r"^\p{L}+$", "Adaé", "1"),
        (r"^\\w$", "\\w", "a"),
        (r"^\+?[0-9 ()-]{5,30}$", "+49 (0) 12345", "x"),
        (r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}$", "2026-01-01T00:00", "2026"),
        (r"^[[:alpha:]]{1,100}$", "abc", "1"),
        (r"^.{1,900}$", "x", ""),
        (r"^\{5000\}[({]{2}$", "{5000}({", "{5000}"),
    ],
)
def test_patterns_that_people_write_are_taken(pattern: str, good: str, bad: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert check(schema, good) == good
    with pytest.raises(pydantic.ValidationError):
        check(schema, bad)


@pytest.mark.parametrize(
    "unit", ["{", "(", "[^", "(?", "(?<", r"\p{", r"\p", r"\x{", "{1,", "{ ", "[(", "a{" + "9" * 500]
)
def test_a_pattern_is_weighed_in_one_pass(unit: str) -> None:
    """`{` and 400 spaces took 7 s with the GIL held, and 700 took minutes: this test's timeout."""
    for start, filler in itertools.product(("", "{", "[", r"a\p{", "(?"), (" ", "1", unit)):
        for size in (patterns.MAX_CHARS, 1000 * patterns.MAX_CHARS):
            pattern = (start + unit + filler * (size // len(filler)))[:size]
            try:
                type_parser.read_type({"type": "string", "pattern": pattern}, AT)
            except InvalidArgs as error:
                assert str(error).startswith(f"{AT}.pattern: ")


ATOMS = [
    *(
        "a",
        "k",
        ".",
        "é",
        "^",
        "$",
        r"\b",
        r"\(",
        r"\{",
        "[a-z]",
        "[^a]",
        "[]a]",
        "[^](]",
        "[a[(]b]",
        "[(){9}]",
        r"[\]{9}]",
    ),
    *(
        r"\pL",
        r"\p{Greek}",
        r"\PL",
        r"\s",
        r"\S",
        r"\x{1F600}",
        r"\u4e00",
        r"\xe9",
        r"[[:alpha:]\pL(]",
        r"[\w--\pN]",
        r"[^\PL]",
    ),
]
REPEATED = ["{2}", "{9}", "{100}", "{1,7}", "{3,}", "{0,5}", "{ 4 , 6 }", "{2}?", "*", "+", "?"]
GROUPS = ["(%s)", "(?:%s)", "(?P<ix>%s)", "(?<x>%s)", "(?i:%s)", "(?s:%s)", "(?i)%s"]
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: (
        st.builds(str.__add__, inner, inner)
        | st.builds("{}|{}".format, inner, inner)
        | st.builds(str.__mod__, st.sampled_from(GROUPS), inner)
        | st.builds("(?:{}){}".format, inner, st.sampled_from(REPEATED))
        | st.builds(str.__add__, st.sampled_from(ATOMS), st.sampled_from(REPEATED))
    ),
    max_leaves=12,
)


@settings(max_examples=60)
@given(PATTERNS)
def test_no_pattern_is_larger_than_it_was_weighed(pattern: str) -> None:
    """Rust refuses patterns of more than 10 MB: a size of 30,000 is never refused, so 6,000 take 2 MB at most."""
    size = patterns._size(pattern)
    if size <= patterns.MAX_SIZE:
        repeated = f"(?:{pattern}){{{int(30_000 / max(size, 1))}}}"
        try:
            SchemaValidator(core_schema.str_schema(pattern=repeated))
        except SchemaError as error:
            assert "size limit" not in str(error)


# Each position may begin a match, which 500 more characters decide.
SLOW = {"type": "string", "pattern": "[ab]*a[ab]{500}c"}


def test_a_text_that_its_pattern_would_take_long_for_is_refused() -> None:
    """10 MB took half a minute with the GIL held."""
    text = "".join(random.Random(1).choices("ab", k=1_000_000))
    with pytest.raises(pydantic.ValidationError, match="at most 13271 characters, for its pattern"):
        check(SLOW, 10 * text)
    assert check({"type": "string", "pattern": "^[^<>]*$"}, text) == text


def test_texts_that_their_patterns_would_together_take_long_for_are_refused() -> None:
    """50 MB took minutes: this test's timeout. Thousands of usual strings pass."""
    text = "".join(random.Random(1).choices("ab", k=10_000)) + "a" + 500 * "b" + "c"
    assert check(SLOW, text) == text
    slow: dict[str, Any] = {"type": "array", "items": SLOW}
    with pytest.raises(pydantic.ValidationError) as caught:
        check(slow, [text] * 5000)
    assert caught.value.errors()[-1]["msg"] == "Input should take its patterns less time"
    with pytest.raises(InvalidArgs, match="default: does not fit"):
        type_parser.read_type({**slow, "default": [text] * 5000}, AT)
    emails = [f"ada.{n}@example.org" for n in range(10_000)]
    plain = {"type": "array", "items": {"type": "string", "pattern": r"^[\w.+-]{1,64}@[\w-]{1,63}\.\w{2,24}$"}}
    assert check(plain, emails) == emails


def test_patterns_take_no_memory_of_each_program() -> None:
    """Of hundreds of patterns, only some MB are kept compiled."""

    def resident() -> int:
        return psutil.Process().memory_info().rss

    def heavy(n: int) -> dict[str, Any]:
        return obj(**{f"p{m}": {"type": "string", "pattern": rf"^x{n}y{m}\w{{100}}.*\p{{L}}"} for m in range(10)})

    alive = [type_parser.read_type(heavy(0), AT)]
    before = resident()
    alive += [type_parser.read_type(heavy(n), AT) for n in range(1, 40)]
    assert resident() - before < 60_000_000
    text = "x7y3" + "a" * 100 + "é"
    assert pydantic.TypeAdapter(alive[7]).validate_python({"p3": text}) == {"p3": text}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
WORDS = st.sampled_from([*keywords._KNOWN, *keywords._ROOT, "foo"])
TYPES = st.sampled_from([*keywords.FOR, "text"])
SCHEMA_LIKE = st.recursive(
    JSON | TYPES | st.sampled_from(["#/$defs/a", "#/definitions/a", "^a", "("]),
    lambda inner: (
        st.dictionaries(WORDS, inner | TYPES, max_size=4)
        | st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "$ref"]), inner, max_size=3)
    ),
    max_leaves=20,
)


@settings(max_examples=200)
@given(st.dictionaries(WORDS | st.text(), SCHEMA_LIKE, max_size=5))
def test_any_json_is_a_type_or_refused(schema: dict[str, Any]) -> None:
    """Only `InvalidArgs` is raised; a type can be shown and used."""
    try:
        annotation = type_parser.read_type(schema, AT)
    except InvalidArgs as error:
        assert str(error).startswith(AT)
        return
    adapter = pydantic.TypeAdapter(annotation)
    assert isinstance(adapter.json_schema(), dict)
    for value in (None, "a", {}, [], {"a": None}):
        try:
            adapter.validate_python(value)
        except pydantic.ValidationError:
            pass


NAMES = st.text(max_size=6) | st.sampled_from(ODD_NAMES)


@st.composite
def schema_and_value(draw: Any, depth: int = 3) -> tuple[dict[str, Any], Any]:
    """A schema and a valid value."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "any"]
    kind = draw(st.sampled_from(kinds + ["object", "array", "map", "tuple", "anyOf"] * (depth > 0)))
    if kind == "string":
        text = draw(st.text(string.ascii_letters, max_size=5))
        return draw(st.sampled_from([TEXT, {"type": "string", "maxLength": 5, "pattern": "^[a-zA-Z]*$"}])), text
    if kind == "integer":
        number = draw(st.integers(-(10**30), 10**30))
        return draw(st.sampled_from([INT, {"type": "integer", "minimum": number, "maximum": number}])), number
    if kind == "number":
        return {"type": "number"}, draw(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
    if kind == "boolean":
        return {"type": "boolean"}, draw(st.booleans())
    if kind == "null":
        return {"type": "null"}, None
    if kind == "enum":
        values = draw(st.lists(st.text(max_size=3) | st.booleans() | st.none(), min_size=1, max_size=4, unique=True))
        return {"enum": values}, draw(st.sampled_from(values))
    if kind == "any":
        return {}, draw(JSON)
    if kind == "array":
        schema, value = draw(schema_and_value(depth - 1))
        return {"type": "array", "items": schema}, [value] * draw(st.integers(0, 2))
    if kind == "map":
        schema, value = draw(schema_and_value(depth - 1))
        return {"type": "object", "additionalProperties": schema}, dict.fromkeys(
            draw(st.lists(NAMES, max_size=2)), value
        )
    parts = draw(st.lists(schema_and_value(depth - 1), min_size=1, max_size=3))
    if kind == "tuple":
        return {"type": "array", "prefixItems": [schema for schema, _ in parts]}, [value for _, value in parts]
    if kind == "anyOf":
        return {"anyOf": [parts[0][0], {"type": "null"}]}, draw(st.sampled_from([parts[0][1], None]))
    names = draw(st.lists(NAMES, min_size=len(parts), max_size=len(parts), unique=True))
    properties = {name: schema for name, (schema, _) in zip(names, parts, strict=True)}
    value = {name: value for name, (_, value) in zip(names, parts, strict=True)}
    return {"type": "object", "properties": properties, "required": names}, value


@settings(max_examples=300)
@given(schema_and_value())
def test_a_value_that_fits_its_schema_comes_back_equal(pair: tuple[dict[str, Any], Any]) -> None:
    schema, value = pair
    assert json.dumps(check({**obj(v=schema), "required": ["v"]}, {"v": value})) == json.dumps({"v": value})
