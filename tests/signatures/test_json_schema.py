"""json_schema: valid values come back unchanged, and an error names the place in an invalid schema."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.signatures import json_schema, type_parser

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


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "pattern": "^a+$"}, ["aa"], ["ab", ""]),
        ({"type": "string", "format": "date"}, ["2026-02-28"], ["2026-02-30", "20260228", "1700000000", "soon"]),
        ({"type": "string", "format": "time"}, ["23:59:59", "10:00:00.5Z", "10:00:00+01:00"], ["25:00:00", "10:00"]),
        (
            {"type": "string", "format": "date-time"},
            ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00", "2026-01-01t00:00:00.123+02:00"],
            ["2026-01-01", "2026-13-01T00:00:00Z", "1700000000", "2026-01-01T24:61:00Z"],
        ),
        ({"type": "string", "format": "email"}, ["ada@example.org"], ["ada", 5]),
        ({"type": "integer", "multipleOf": 5.0}, [0, 10, 3 * 10**20], [3, 10**20 + 1]),
        (INT, [10**100, -(10**100)], ["x", 1.5, None, [], {}]),
        ({"type": "number", "minimum": 0.5}, [0.5, 1], [0.4, float("nan"), float("inf")]),
        ({"enum": ["a", 1, 0.5, None]}, ["a", 1, 0.5, None], ["b", 2, []]),
        ({"type": ["integer", "string"]}, [5, "5"], [None, []]),
        ({"items": INT}, [[1]], [["x"], 5]),
        ({"type": "array", "uniqueItems": True}, [[1, True, "1", {"a": 1}, [1]]], [[1, 1.0], [{"a": [1]}, {"a": [1]}]]),
        ({"type": "array", "prefixItems": [INT, TEXT]}, [[1, "a"]], [[1], [1, "a", 2], ["a", 1]]),
        ({"properties": {"a": INT}, "required": ["a"]}, [{"a": 1, "more": [1]}], [{}, {"a": None}, "x"]),
        ({**obj(a=INT), "additionalProperties": False}, [{"a": 1}, {}], [{"b": 1}]),
        ({"type": "object", "additionalProperties": INT}, [{"x": 1}], [{"x": "y"}, []]),
        ({"oneOf": [INT, {"type": "number"}]}, [5], ["x"]),
        ({"allOf": [{"type": "array", "items": INT}, {"maxItems": 1}]}, [[5]], [["x"], [1, 2]]),
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


@pytest.mark.parametrize(
    ("schema", "given", "read"),
    [
        (INT, "5", 5),
        (INT, 5.0, 5),
        ({"type": "number"}, "0.5", 0.5),
        ({"type": "boolean"}, "True", True),
        ({"type": "array", "items": INT}, ("1", 2), [1, 2]),
        (obj(n={"type": ["null", "integer"]}), {"n": "7"}, {"n": 7}),
        ({"anyOf": [obj(n=INT), {"type": "array", "items": INT}]}, ["7"], [7]),
        ({"anyOf": [INT, TEXT]}, "7", "7"),
        ({"type": "array", "prefixItems": [INT, TEXT]}, ["1", "2"], [1, "2"]),
        ({"type": "object", "additionalProperties": INT}, {"a": "1"}, {"a": 1}),
        ({"allOf": [obj(n=INT), obj(m=INT)]}, {"n": "1", "m": "2"}, {"n": 1, "m": 2}),
    ],
)
def test_what_an_lm_wrote_in_another_form_is_converted(schema: Any, given: Any, read: Any) -> None:
    """Where there is one way to read it; what is valid already stays."""
    assert json.dumps(check(schema, given)) == json.dumps(read)


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
        (obj(x={"foo": 1}), ".properties.x: unknown key 'foo'; expected type, $ref"),
        ({"type": "string", "maxlength": 5}, ": unknown key 'maxlength'; did you mean maxLength?"),
        ({"not": {"type": "string"}}, ": unknown key 'not'"),
        (obj(x={"$defs": {}}), ".properties.x: unknown key '$defs'"),
        (obj(**{"a b": 5}), ".properties['a b']: the value is not of type"),
        ({"type": "text"}, ".type: expected one or more of string, integer"),
        ({"type": ["string", {}]}, ".type: expected one or more"),
        ({"type": "object", "required": "x"}, ".required: "),
        ({"enum": "a"}, ".enum: "),
        ({"type": "string", "minLength": -1}, ".minLength: the value is less than the minimum of 0"),
        ({"type": "string", "pattern": "("}, ".pattern: cannot be read"),
        ({"type": "string", "pattern": "(?=a)"}, ".pattern: cannot be read"),
        ({"type": "string", "pattern": "((a{1000}){1000}){1000}"}, ".pattern: cannot be read, or is too large"),
        ({"type": "number", "multipleOf": 0}, ".multipleOf: "),
        ({"type": "array", "items": [INT]}, ".items: "),
        ({"anyOf": [INT, {"foo": 1}]}, ".anyOf[1]: unknown key 'foo'"),
        ({"$ref": 5}, ".$ref: "),
        ({"$ref": "#"}, '.$ref: expected "#/$defs/NAME"'),
        ({"$ref": "http://example.org/x.json"}, '.$ref: expected "#/$defs/NAME"'),
        ({"$ref": "file:///etc/passwd"}, '.$ref: expected "#/$defs/NAME"'),
        ({"$ref": "#/$defs/x"}, ".$ref: there is no $defs.x"),
        ({"$ref": "#/$defs/x", "$defs": {"x": INT}, "minimum": 1}, ": minimum cannot be combined with $ref"),
        (CYCLE, ".$defs.a: nested too deep, or recursive, which is not supported; expected at most 64"),
        ({"type": "string", "$defs": []}, ".$defs: "),
        ({"type": "string", "default": 5}, ".default: does not fit"),
        ({"type": "integer", "default": "5"}, ".default: does not fit"),
        (obj(x={"type": "array", "items": INT, "default": ["x"]}), ".properties.x.default: does not fit"),
        (5, ": expected text such as str, list[int]"),
        (True, ": expected text such as str, list[int]"),
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


@pytest.mark.parametrize("word", ["properties", "anyOf", "items", "additionalProperties"])
def test_the_deepest_schema_works_and_one_deeper_is_refused(word: str) -> None:
    assert shown(nested(word, json_schema.MAX_DEPTH))
    with pytest.raises(InvalidArgs, match=f"at most {json_schema.MAX_DEPTH} schemas inside"):
        type_parser.read_type(nested(word, json_schema.MAX_DEPTH + 1), AT)


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
        (r"^.{1,900}$", "x", ""),
        (r"^\{5000\}[({]{2}$", "{5000}({", "{5000}"),
    ],
)
def test_patterns_that_people_write_are_taken(pattern: str, good: str, bad: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert check(schema, good) == good
    with pytest.raises(pydantic.ValidationError):
        check(schema, bad)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
WORDS = st.sampled_from([*json_schema._KNOWN, *json_schema._ROOT, "foo"])
TYPES = st.sampled_from([*json_schema._SCALARS, "array", "object", "text"])
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


def test_references_that_multiply_are_refused_at_once() -> None:
    """Twenty definitions, each with two references to the next, are a million schemas."""
    definitions = {f"d{n}": obj(a={"$ref": f"#/$defs/d{n + 1}"}, b={"$ref": f"#/$defs/d{n + 1}"}) for n in range(20)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**definitions, "d20": INT}}
    began = time.monotonic()
    with pytest.raises(InvalidArgs, match="too large; expected at most 10000 schemas"):
        type_parser.read_type(schema, AT)
    assert time.monotonic() - began < 5
