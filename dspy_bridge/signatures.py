"""Field definitions from a request to a `dspy.Signature`. Type texts are parsed here and never evaluated.

DSPy's own parser of string signatures imports modules that a type names, so no text of a client reaches it.
"""

from __future__ import annotations

import ast
import keyword
from typing import Any

import dspy
import pydantic

from dspy_bridge.annotations import PROBABILITY, parse, parse_type, resolve
from dspy_bridge.errors import InvalidArgs

# Python's parser holds the interpreter lock throughout: 16,000 characters take it some 30 ms.
MAX_SIGNATURE_CHARS = 16_000
MAX_FIELDS = 1000

# Keyword arguments that Predict and its callers keep for themselves.
_NOT_AS_INPUT = frozenset(("self", "instance", "signature", "demos", "config", "lm", "new_signature", "completions"))


class Contract:
    """A signature, and what its input values and constrained outputs are checked with.

    `inputs`: name to a validator, None where any value will do; `outputs`: the same, constrained ones only.
    """

    __slots__ = ("inputs", "outputs", "signature")

    def __init__(self, signature: type[dspy.Signature]) -> None:
        self.signature = signature
        self.inputs: dict[str, pydantic.TypeAdapter[Any] | None] = {}
        self.outputs: dict[str, pydantic.TypeAdapter[Any]] = {}


def build(definition: object) -> Contract:
    """The signature of a `create_program`: DSPy's string form, or `{"inputs", "outputs", "instructions"?}`.

    Raises `InvalidArgs`, naming the field.
    """
    instructions = None
    if isinstance(definition, str):
        inputs, outputs = _parse_string(definition)
    elif isinstance(definition, dict):
        _refuse_unknown(definition, ("inputs", "outputs", "instructions"), "signature")
        inputs = _read_fields(definition.get("inputs"), "signature.inputs")
        outputs = _read_fields(definition.get("outputs"), "signature.outputs")
        instructions = definition.get("instructions")
        if instructions is not None and not isinstance(instructions, str):
            raise InvalidArgs("signature.instructions: expected text")
    else:
        raise InvalidArgs('signature: expected text ("question -> answer") or an object with inputs and outputs')
    if not outputs:
        raise InvalidArgs("signature.outputs: expected at least one field")
    if len(inputs) + len(outputs) > MAX_FIELDS:
        raise InvalidArgs(f"signature: expected at most {MAX_FIELDS} fields")
    return _contract(inputs, outputs, instructions)


class _Field:
    __slots__ = ("annotation", "description", "name", "where")

    def __init__(self, name: object, annotation: Any, description: str | None, where: str) -> None:
        self.name = _check_name(name, where)
        self.annotation = annotation
        self.description = description
        self.where = where


def _contract(inputs: list[_Field], outputs: list[_Field], instructions: str | None) -> Contract:
    fields: dict[str, Any] = {}
    for group, make in ((inputs, dspy.InputField), (outputs, dspy.OutputField)):
        for field in group:
            if field.name in fields:
                raise InvalidArgs(f"{field.where}.name: {field.name!r} is used twice; expected distinct names")
            if group is inputs and field.name in _NOT_AS_INPUT:
                raise InvalidArgs(f"{field.where}.name: {field.name!r} is reserved by DSPy; choose another name")
            extra: dict[str, Any] = {"desc": field.description} if field.description else {}
            if field.annotation is PROBABILITY:
                extra = {**extra, "ge": 0, "le": 1}  # DSPy tells the LM of constraints that the field function gets
            fields[field.name] = (field.annotation, make(**extra))
    contract = Contract(dspy.Signature(fields, instructions or None))
    for field in inputs:
        plain = field.annotation in (str, Any)
        contract.inputs[field.name] = None if plain else pydantic.TypeAdapter(field.annotation)
    for field in outputs:
        if field.annotation is PROBABILITY:
            contract.outputs[field.name] = pydantic.TypeAdapter(PROBABILITY)
    return contract


def _read_fields(fields: object, where: str) -> list[_Field]:
    if not isinstance(fields, list):
        raise InvalidArgs(f"{where}: expected a list of fields")
    read = []
    for index, field in enumerate(fields):
        here = f"{where}[{index}]"
        if not isinstance(field, dict):
            raise InvalidArgs(f'{here}: expected an object such as {{"name": "question", "type": "str"}}')
        _refuse_unknown(field, ("name", "type", "description", "desc"), here)
        description = field.get("description", field.get("desc"))
        if description is not None and not isinstance(description, str):
            raise InvalidArgs(f"{here}.description: expected text")
        type_text = field.get("type")
        if type_text is not None and not isinstance(type_text, str):
            raise InvalidArgs(f"{here}.type: expected text such as str, list[int] or Literal['a', 'b']")
        annotation = str if type_text is None else parse_type(type_text, f"{here}.type")
        read.append(_Field(field.get("name"), annotation, description, here))
    return read


def _refuse_unknown(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise InvalidArgs(f"{where}: unknown key {key!r}; expected {', '.join(known)}")


def _check_name(name: object, where: str) -> str:
    if not isinstance(name, str) or not name:
        raise InvalidArgs(f"{where}.name: expected text")
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise InvalidArgs(f"{where}.name: {name!r} is no name for a field; expected letters, digits and _, no keyword")
    if name.startswith("dspy_"):
        raise InvalidArgs(f"{where}.name: {name!r}: DSPy hides fields that start with dspy_; choose another name")
    if hasattr(dspy.Signature, name):
        raise InvalidArgs(f"{where}.name: {name!r} is an attribute of every DSPy signature; choose another name")
    return name


def _parse_string(text: str) -> tuple[list[_Field], list[_Field]]:
    if len(text) > MAX_SIGNATURE_CHARS:
        raise InvalidArgs(f"signature: expected at most {MAX_SIGNATURE_CHARS} characters, or an object")
    sides = text.split("->")
    if len(sides) != 2:
        raise InvalidArgs('signature: expected exactly one "->", as in "question -> answer"')
    inputs, outputs = (
        [_Field(name, annotation, None, f"signature.{where}") for name, annotation in _parse_side(side, where)]
        for side, where in zip(sides, ("inputs", "outputs"), strict=True)
    )
    return inputs, outputs


def _parse_side(side: str, where: str) -> list[tuple[str, Any]]:
    here = f"signature.{where}"
    # On lines of its own: a comment sign in it must not hide what follows.
    tree = parse(f"def f(\n{side.strip()}\n): pass", here, "exec", side.strip())
    body = tree.body
    function = body[0] if len(body) == 1 else None
    if (
        not isinstance(function, ast.FunctionDef)
        or len(function.body) != 1
        or not isinstance(function.body[0], ast.Pass)
    ):
        raise InvalidArgs(f"{here}: expected fields such as question, context: list[str]")
    given = function.args
    if given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg or given.defaults:
        raise InvalidArgs(f"{here}: expected fields such as question, context: list[str]")
    return [
        (arg.arg, str if arg.annotation is None else resolve(arg.annotation, f"{here}.{arg.arg}")) for arg in given.args
    ]
