"""Field definitions from a request to a `dspy.Signature`. Type texts are parsed here and never evaluated.

DSPy's own parser of string signatures imports modules that a type names, so no text of a client reaches it.
"""

from __future__ import annotations

import ast
import json
import keyword
from typing import Annotated, Any, get_origin

import dspy
import pydantic

from dspy_bridge.errors import InvalidArgs, refuse_unknown
from dspy_bridge.signatures.type_parser import PROBABILITY, parse, read_type, resolve
from dspy_bridge.signatures.validation import Contract, Turn, validator_of

# Python's parser holds the interpreter lock throughout: 16,000 characters take it some 30 ms.
MAX_SIGNATURE_CHARS = 16_000
MAX_FIELDS = 1000
# DSPy's own name for signatures that have none.
_NAME = "StringSignature"

# Keyword arguments that Predict and its callers keep for themselves.
_NOT_AS_INPUT = frozenset(
    # `prediction`: one that looks like OpenAI's predicted output would become a setting of the LM, out of the prompt.
    ("self", "instance", "signature", "demos", "config", "lm", "new_signature", "completions", "prediction")
)


def build(definition: object, *, files_dir: str | None = None, left_out: tuple[str, ...] = ()) -> Contract:
    """The signature of a `create_program`: DSPy's string form, or `{"inputs", "outputs", "instructions"?}`.

    DSPex also sends `name`, that of the signature's class, and `description`: instructions where there are none.
    `files_dir`: the folder that paths in inputs may lead to; none if None. `left_out`: inputs that may be declared and
    are no fields. Raises `InvalidArgs`, naming the field.
    """
    instructions = name = None
    if isinstance(definition, str):
        inputs, outputs = _parse_string(definition)
    elif isinstance(definition, dict):
        refuse_unknown(definition, ("inputs", "outputs", "instructions", "name", "description"), "signature")
        inputs = _read_fields(definition.get("inputs"), "signature.inputs")
        outputs = _read_fields(definition.get("outputs"), "signature.outputs")
        description = _optional_text(definition, "description")
        instructions = _optional_text(definition, "instructions") or description
        name = _optional_text(definition, "name")
        if name is not None and not name.isprintable():
            raise InvalidArgs("signature.name: expected a name on one line")
    else:
        raise InvalidArgs('signature: expected text ("question -> answer") or an object with inputs and outputs')
    inputs = [field for field in inputs if field.name not in left_out]
    if not outputs:
        raise InvalidArgs("signature.outputs: expected at least one field")
    if len(inputs) + len(outputs) > MAX_FIELDS:
        raise InvalidArgs(f"signature: expected at most {MAX_FIELDS} fields")
    return _contract(inputs, outputs, instructions, name or _NAME, files_dir)


class _Field:
    __slots__ = ("annotation", "default", "description", "name", "where")

    def __init__(
        self, name: object, annotation: Any, description: str | None, where: str, default: dict[str, Any] | None = None
    ) -> None:
        self.name = _check_name(name, where)
        self.default = default or {}
        self.annotation = annotation
        self.description = description
        self.where = where


def _contract(
    inputs: list[_Field], outputs: list[_Field], instructions: str | None, name: str, files_dir: str | None
) -> Contract:
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
            info = make(**extra)
            if field.annotation is not PROBABILITY and get_origin(field.annotation) is Annotated:
                schema = json.dumps(pydantic.TypeAdapter(field.annotation).json_schema(), ensure_ascii=False)
                info.json_schema_extra["constraints"] = f"must adhere to the JSON schema: {schema}"
            fields[field.name] = (field.annotation, info)
    contract = Contract(dspy.Signature(fields, instructions or None, name))
    turn = Turn({field.name: field.annotation for field in (*inputs, *outputs)}, files_dir)
    for field in inputs:
        contract.inputs[field.name] = validator_of(field.annotation, files_dir, turn.read)
        if field.default:
            contract.defaults[field.name] = field.default["default"]
    for field in outputs:
        # DSPy checks an answer with the type alone, without what Annotated adds.
        if get_origin(field.annotation) is Annotated:
            contract.outputs[field.name] = pydantic.TypeAdapter(field.annotation)
    return contract


def _read_fields(fields: object, where: str) -> list[_Field]:
    if not isinstance(fields, list):
        raise InvalidArgs(f"{where}: expected a list of fields")
    read = []
    for index, field in enumerate(fields):
        here = f"{where}[{index}]"
        if not isinstance(field, dict):
            raise InvalidArgs(f'{here}: expected an object such as {{"name": "question", "type": "str"}}')
        refuse_unknown(field, ("name", "type", "description", "desc"), here)
        description = field.get("description", field.get("desc"))
        if description is not None and not isinstance(description, str):
            raise InvalidArgs(f"{here}.description: expected text")
        kind = field.get("type")
        annotation = read_type(kind, f"{here}.type")
        default = None
        if isinstance(kind, dict):
            description = description or kind.get("description")
            default = {"default": kind["default"]} if "default" in kind else None
        read.append(_Field(field.get("name"), annotation, description, here, default))
    return read


def _optional_text(definition: dict[str, Any], key: str) -> str | None:
    value = definition.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidArgs(f"signature.{key}: expected text")
    return value


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
