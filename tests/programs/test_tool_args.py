"""Which arguments of a tool the LM may leave out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.programs import tool_args

WHERE = "tools[0]"
REQUIRED = object()
DOES_NOT_FIT = "does not fit the type that it is for"
AT_LEAST_3 = {"type": "integer", "minimum": 3}


def read(definition: dict[str, Any]) -> dict[str, tool_args.Arg]:
    return tool_args.read(definition, WHERE)


@pytest.mark.parametrize(
    ("arg", "default"),
    [
        ("int", REQUIRED),
        ({"type": "any"}, REQUIRED),
        ({"type": "int", "optional": False}, REQUIRED),
        ({"type": "Optional[int]", "optional": False}, REQUIRED),
        ({"type": "int", "optional": True}, ...),
        ({"type": "Optional[int]"}, None),
        ({"type": {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}]}}, None),
        ({"type": "Literal['a', None]"}, None),
        ({"type": "integer", "default": 10}, 10),
        ({"default": "x"}, "x"),
        ({"type": "int", "default": 10**30}, 10**30),
        ({"type": "date", "default": "2026-01-31"}, "2026-01-31"),
        ({"type": "tuple[int, str]", "default": [1, "a"]}, [1, "a"]),
        ({"type": "any", "default": {"a": [1]}}, {"a": [1]}),
        ({"type": {**AT_LEAST_3, "default": 4}, "default": 5}, 5),
        ({"type": "int", "default": None}, ...),
        ({"type": AT_LEAST_3, "default": None}, ...),
        ({"type": "any", "default": None}, None),
    ],
)
def test_what_may_be_left_out(arg: Any, default: Any) -> None:
    found = read({"args": {"q": arg}})["q"]
    assert found.required == (default is REQUIRED)
    assert found.default == (... if default is REQUIRED else default)
    assert found.schema.get("default", ...) == found.default, "the LM is shown the default"
    assert ("optional" in found.schema.get("description", "")) == (default is ...)


def test_parameters_are_a_json_schema() -> None:
    """A default makes an argument one that may be left out; null for a type that takes it stays null."""
    properties = {
        "q": {"type": "string", "description": "words"},
        "most": {"type": "integer", "default": 10},
        "unit": {"$ref": "#/$defs/unit"},
        "lang": {"type": ["string", "null"]},
        "more": True,
    }
    definitions = {"unit": {"enum": ["a", "b"], "description": "of what"}}
    parameters = {"type": "object", "properties": properties, "required": ["q"], "$defs": definitions, "title": "T"}
    found = read({"parameters": parameters})
    assert [name for name, arg in found.items() if arg.required] == ["q"]
    assert {name: arg.default for name, arg in found.items() if arg.default is not ...} == {"most": 10}
    assert found["q"].schema == {"type": "string", "description": "words"}
    assert found["unit"].schema["enum"] == ["a", "b"] and found["unit"].schema["description"] == "of what (optional)"
    assert read({"parameters": {"type": "object"}}) == {}
    alone = read({"parameters": {"type": "object", "required": ["any"]}})
    assert alone["any"].required and alone["any"].schema == {}


@pytest.mark.parametrize(
    ("definition", "text"),
    [
        *(
            ({"args": {"q": {"type": kind, "default": default}}}, f".args.q.default: {DOES_NOT_FIT}")
            for kind, default in (
                ("integer", "10"),
                ("list[int]", [1, "2"]),
                ("probability", 2),
                ("image", "/etc/hostname"),
                (AT_LEAST_3, "10"),
                (AT_LEAST_3, 2),
            )
        ),
        ({"args": {"q": {"type": {**AT_LEAST_3, "default": 2}}}}, f".args.q.type.default: {DOES_NOT_FIT}"),
        *(({"args": {"q": {"optional": wrong}}}, ".args.q.optional: expected true") for wrong in (1, "yes", None, [])),
        ({"args": {"q": {"optionl": True}}}, ".args.q: unknown key 'optionl'; did you mean optional?"),
        ({"args": {}, "parameters": {"type": "object"}}, ": has args and parameters; expected one of them"),
        *(
            ({"parameters": wrong}, ".parameters: expected a JSON Schema such as")
            for wrong in (None, 5, [], {}, {"query": "str"}, {"type": "string"}, {"type": ["object", "null"]})
        ),
        *(
            ({"parameters": {"type": "object", **more}}, f".parameters{text}")
            for more, text in (
                ({"properties": []}, ".properties: the value is not of type"),
                ({"properties": {"q": {"type": "nosuch"}}}, ".properties.q.type: expected one or more"),
                ({"properties": {"q": 5}}, ".properties.q: the value is not of type"),
                ({"properties": {"q": {"type": "integer", "default": "x"}}}, f".properties.q.default: {DOES_NOT_FIT}"),
                ({"properties": {"q": {}}, "required": "q"}, ".required: the value is not of type"),
                ({"properties": {"self": {}}}, ".properties.self: 'self' is an argument of DSPy's"),
                ({"properties": {"q": {"$ref": "#/$defs/q"}}}, ".properties.q.$ref"),
                ({"properties": {f"a{n}": {} for n in range(101)}}, ".properties: expected at most 100"),
                ({"requird": []}, ": unknown key 'requird'; did you mean required?"),
            )
        ),
    ],
)
def test_what_is_refused_names_the_field(definition: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgs) as refused:
        read(definition)
    assert str(refused.value).startswith(f"{WHERE}{text}")
