"""builder and validation: inputs are validated before an LM call, and outputs after it."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from dspy_bridge.errors import InvalidArgs, OutputInvalid
from dspy_bridge.signatures import builder

PERSON = {
    "type": "object",
    "properties": {"first-name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["first-name"],
}


def field(name: str, kind: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, **({} if kind is None else {"type": kind}), **more}


def contract(*inputs: dict[str, Any], outputs: tuple[dict[str, Any], ...] = (field("answer"),)) -> builder.Contract:
    return builder.build({"inputs": list(inputs), "outputs": list(outputs)})


def refused(made: builder.Contract, inputs: dict[str, Any]) -> str:
    with pytest.raises(InvalidArgs) as caught:
        made.check(inputs)
    return str(caught.value)


def test_all_that_is_wrong_with_inputs_is_named_at_once() -> None:
    made = contract(field("q"), field("n", "int"), field("who", PERSON))
    error = refused(made, {"n": "SECRET", "who": {"age": 5}, "w": 1, "a b": 2})
    assert error.startswith(
        "inputs.w: unknown field; inputs['a b']: unknown field; inputs.q: missing; inputs.n: Input "
    )
    assert error.endswith('; inputs.who: "first-name" is a required property; expected q, n, who')
    assert "SECRET" not in error


def test_values_are_converted_as_pydantic_does() -> None:
    made = contract(field("n", "int"), field("tags", "list[float]"), field("who", PERSON))
    values = made.check({"n": "5", "tags": [1, "2.5"], "who": {"first-name": "Ada", "more": None}})
    assert values == {"n": 5, "tags": [1.0, 2.5], "who": {"first-name": "Ada", "more": None}}
    assert type(values["who"]) is dict


def test_an_input_that_may_be_none_may_be_left_out_and_one_with_a_default_gets_it() -> None:
    made = contract(
        field("maybe", "Optional[str]"),
        field("n", {"type": "integer", "default": 3}),
        field("tags", {"type": "array", "items": {"type": "string"}, "default": []}),
        field("null", {"type": ["string", "null"]}),
        field("any", {"default": []}),
    )
    values = made.check({})
    assert values == {"n": 3, "tags": [], "any": []}
    values["tags"].append("x")
    values["any"].append("x")
    assert made.check({}) == {"n": 3, "tags": [], "any": []}, "each call has a default of its own"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("probability", 0.5, 1.5),
        ({"type": "integer", "minimum": 0}, 0, -1),
        ({"type": "string", "pattern": "^a"}, "ab", "b"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, {"x": 1}, {"x": "y"}),
        ({"type": ["string", "null"], "minLength": 2}, None, "a"),
    ],
)
def test_what_dspy_does_not_check_of_an_answer_is_checked(kind: Any, good: Any, bad: Any) -> None:
    made = contract(outputs=(field("it", kind), field("other")))
    outputs = {"it": good, "other": "x"}
    made.check_outputs(outputs)
    assert outputs == {"it": good, "other": "x"}
    with pytest.raises(OutputInvalid, match=r"the LM's answer did not fit the signature: it(\.x)?: "):
        made.check_outputs({"it": bad, "other": "x"})


NULL = {"type": "null"}
DATE = {"type": "string", "format": "date"}


@pytest.mark.parametrize(
    "kind",
    [
        "Optional[str]",
        {"anyOf": [{"type": "string"}, NULL]},
        {"anyOf": [DATE, NULL]},
    ],
)
def test_an_answer_of_text_or_null_can_be_null(kind: Any) -> None:
    """DSPy takes what an LM writes for such a field as it is."""
    made = contract(outputs=(field("it", kind), field("text")))
    for written, read in (("null", None), (" None\n", None), (None, None), ("2026-01-01", "2026-01-01")):
        outputs = {"it": written, "text": "null"}
        made.check_outputs(outputs)
        assert outputs == {"it": read, "text": "null"}


def test_what_is_inside_an_optional_object_is_named() -> None:
    """As in one that is required. The names of all inputs would be no answer to it."""
    made = contract(field("q"), field("who", {"anyOf": [PERSON, {"type": "null"}]}))
    assert refused(made, {"q": "?", "who": {"age": 5}}) == 'inputs.who: "first-name" is a required property'
    assert refused(made, {"q": "?", "who": "Ann"}) == 'inputs.who: the value is not of type "object"'
    made = contract(field("day", {"type": ["string", "null"], "format": "date"}))
    assert refused(made, {"day": 5}) == 'inputs.day: the value is not of types "null", "string"'
    assert made.check({"day": None}) == {"day": None}


def test_null_is_no_text() -> None:
    """DSPy would write None into the prompt. Any other value is accepted."""
    made = contract(field("q"), field("any", "any"), field("maybe", "Optional[str]"))
    assert refused(made, {"q": None, "any": 1}) == "inputs.q: expected text"
    for listed in ([1, 2], [2.5], ["a", None], [True]):
        assert refused(made, {"q": listed, "any": 1}).startswith("inputs.q: expected text; a list with numbers, ")
    for value in ("", 5, 2.5, False, ["a"], [], [{"a": 1}], {"a": None}):
        assert made.check({"q": value, "any": None, "maybe": None}) == {"q": value, "any": None, "maybe": None}


def test_a_name_and_a_description_are_the_signatures_own() -> None:
    """The description is only used without instructions."""
    definition = {"name": "MyApp.Answers", "description": "Answer.", "inputs": [], "outputs": [field("answer")]}
    made = builder.build(definition).signature
    assert (made.__name__, made.instructions) == ("MyApp.Answers", "Answer.")
    assert builder.build({**definition, "instructions": "Be brief."}).signature.instructions == "Be brief."
    plain = builder.build({**definition, "name": None, "description": ""}).signature
    assert plain.instructions == "Given the fields , produce the fields `answer`."
    for key, value in (("name", 5), ("name", "a\x00b"), ("description", ["x"])):
        with pytest.raises(InvalidArgs, match=rf"signature\.{key}: expected"):
            builder.build({**definition, key: value})


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("dict<string, list<integer>>", dict[str, list[int]]),
        ("list<Literal['a','<b>']>", list[Literal["a", "<b>"]]),
        ('dict<string, Literal["a\\">", "it\'s"]>', dict[str, Literal['a">', "it's"]]),
        ("union<integer|float>", int | float),
        ("Literal['<a>']", Literal["<a>"]),
    ],
)
def test_types_in_angle_brackets_are_dspexs(text: str, kind: Any) -> None:
    assert contract(outputs=(field("it", text),)).signature.output_fields["it"].annotation == kind


LITERAL = "Literal takes strings in quotes, whole numbers, booleans and None"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("__import__('os').system('x')", "signature.inputs[0].type: unknown type"),
        ("list[", "signature.inputs[0].type: 'list[' cannot be read"),
        ("Literal[a, 'b', 3]", f"signature.inputs[0].type: {LITERAL}, got 'a'"),
        ("Literal[a, b()]", f"signature.inputs[0].type: {LITERAL}, got 'a'"),
        ("Literal[open('x')]", "signature.inputs[0].type: Literal takes strings"),
        ("os.path", "signature.inputs[0].type: unknown type 'os.path'"),
        ("list[image, image]", "signature.inputs[0].type: list[…] takes 1 type"),
        ("(lambda: 1)()", "signature.inputs[0].type: unknown type"),
        (5, "signature.inputs[0].type: expected text such as str"),
    ],
)
def test_a_type_that_is_none_is_named(kind: Any, text: str) -> None:
    with pytest.raises(InvalidArgs) as caught:
        contract(field("q", kind))
    assert str(caught.value).startswith(text), str(caught.value)
