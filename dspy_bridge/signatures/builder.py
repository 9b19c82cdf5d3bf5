"""Builds a `dspy.Signature` from the definition in a request. Imports DSPy.

Types are parsed, never evaluated. DSPy's own parser of string signatures imports modules that a type names, so it gets
no string of a client.
"""

from __future__ import annotations

import ast
import json
import keyword
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, get_origin

import dspy
import pydantic
from dspy.experimental import Citations

from dspy_bridge.errors import InvalidArgs, refuse_unknown
from dspy_bridge.signatures.type_parser import PROBABILITY, parse, read_type, resolve
from dspy_bridge.signatures.validation import Contract

MAX_FIELDS = 1000
# DSPy's default name.
_NAME = "StringSignature"

# Keyword parameters of Predict and its callers.
_NOT_AS_INPUT = frozenset(
    # `prediction`: DSPy makes a value that looks like OpenAI's predicted output a setting of the LM.
    ("self", "instance", "signature", "demos", "config", "lm", "new_signature", "completions", "prediction")
)


class _Field(NamedTuple):
    name: str
    annotation: Any
    where: str
    description: str | None = None
    default: Any = ...


def build(definition: object, *, files_dir: str | None = None, left_out: Mapping[str, Any] | None = None) -> Contract:
    """The signature of a `create_program`: DSPy's string form, or `{"inputs", "outputs", "instructions"?}`.

    DSPex also sends `name`, that of the signature's class, and `description`, the default instructions.
    `files_dir`: the folder for paths in inputs; no paths if None. `left_out`: inputs that may be declared but are not
    fields; an agent's conversation may have another name there. Raises `InvalidArgs`, naming the field.
    """
    instructions = name = None
    if isinstance(definition, str):
        inputs, outputs = _parse_string(definition)
    elif isinstance(definition, dict):
        refuse_unknown(definition, ("inputs", "outputs", "instructions", "name", "description"), "signature")
        inputs = _read_fields(definition.get("inputs"), "signature.inputs")
        outputs = _read_fields(definition.get("outputs"), "signature.outputs")
        described = _optional_text(definition, "description", "signature")
        instructions = _optional_text(definition, "instructions", "signature") or described
        name = _optional_text(definition, "name", "signature")
        if name is not None and not name.isprintable():
            raise InvalidArgs("signature.name: expected a name on one line")
    else:
        raise InvalidArgs('signature: expected text ("question -> answer") or an object with inputs and outputs')
    left_out = left_out or {}
    for field in inputs:
        if left_out.get(field.name, Any) not in (Any, field.annotation):
            raise InvalidArgs(f"{field.where}: {field.name!r} is the conversation; expected the type history")
    # DSPy's adapters take the first one, too.
    conversation = next((field.name for field in inputs if field.annotation is dspy.History), None)
    if dspy.History in left_out.values():
        if conversation is None or any(field.name in left_out for field in inputs):
            (conversation,) = left_out
        left_out = {conversation: dspy.History}
    if not outputs:
        raise InvalidArgs("signature.outputs: expected at least one field")
    if len(inputs) + len(outputs) > MAX_FIELDS:
        raise InvalidArgs(f"signature: expected at most {MAX_FIELDS} fields")
    fields: dict[str, Any] = {}
    for group, make in ((inputs, dspy.InputField), (outputs, dspy.OutputField)):
        for field in group:
            if field.name in fields:
                raise InvalidArgs(f"{field.where}.name: {field.name!r} is used twice; expected distinct names")
            if group is inputs and field.name in _NOT_AS_INPUT and left_out.get(field.name) is not Any:
                raise InvalidArgs(f"{field.where}.name: {field.name!r} is reserved by DSPy; choose another name")
            if group is inputs and Citations in dspy.Type.extract_custom_type_from_annotation(field.annotation):
                raise InvalidArgs(f"{field.where}.type: an LM writes citations; expected them in outputs alone")
            if group is inputs and field.name in left_out:
                continue
            extra: dict[str, Any] = {"desc": field.description} if field.description else {}
            if field.annotation is PROBABILITY:
                extra.update(ge=0, le=1)  # DSPy shows the LM constraints that are arguments of the field function
            info = make(**extra)
            if field.annotation is not PROBABILITY and get_origin(field.annotation) is Annotated:
                schema = json.dumps(pydantic.TypeAdapter(field.annotation).json_schema(), ensure_ascii=False)
                info.json_schema_extra["constraints"] = f"must adhere to the JSON schema: {schema}"
            fields[field.name] = (field.annotation, info)
    defaults = {field.name: field.default for field in inputs if field.default is not ... and field.name in fields}
    contract = Contract(dspy.Signature(fields, instructions or None, name or _NAME), defaults, files_dir)
    contract.conversation = conversation
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
        described = description(field, here)
        kind = field.get("type")
        annotation = read_type(kind, f"{here}.type")
        name = _check_name(field.get("name"), here)
        schema = kind if isinstance(kind, dict) else {}
        read.append(_Field(name, annotation, here, described or schema.get("description"), schema.get("default", ...)))
    return read


def description(given: dict[str, Any], where: str) -> str | None:
    """The description of a field, a tool or its argument. Raises `InvalidArgs`."""
    return _optional_text(given, "description" if "description" in given else "desc", where)


def _optional_text(given: dict[str, Any], key: str, where: str) -> str | None:
    value = given.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidArgs(f"{where}.{key}: expected text")
    return value


def _check_name(name: object, where: str) -> str:
    if not isinstance(name, str) or not name:
        raise InvalidArgs(f"{where}.name: expected text")
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise InvalidArgs(f"{where}.name: {name!r} is not a field name; expected letters, digits and _, not a keyword")
    if name.startswith("dspy_"):
        raise InvalidArgs(f"{where}.name: {name!r}: DSPy hides fields that start with dspy_; choose another name")
    if hasattr(dspy.Signature, name):
        raise InvalidArgs(f"{where}.name: {name!r} is an attribute of every DSPy signature; choose another name")
    return name


def _parse_string(text: str) -> tuple[list[_Field], list[_Field]]:
    sides = text.split("->")
    if len(sides) != 2:
        raise InvalidArgs('signature: expected exactly one "->", as in "question -> answer"')
    return _parse_side(sides[0], "signature.inputs"), _parse_side(sides[1], "signature.outputs")


def _parse_side(side: str, where: str) -> list[_Field]:
    # On lines of its own: a comment sign in it must not hide the end.
    body = parse(f"def f(\n{side.strip()}\n): pass", where, "exec", side.strip()).body
    function = body[0]
    if (
        len(body) > 1
        or not isinstance(function, ast.FunctionDef)
        or len(function.body) > 1
        or not isinstance(function.body[0], ast.Pass)
        # Other kinds of parameters, and defaults.
        or list(ast.iter_child_nodes(function.args)) != function.args.args
    ):
        raise InvalidArgs(f"{where}: expected fields such as question, context: list[str]")
    fields = []
    for arg in function.args.args:
        annotation = str if arg.annotation is None else resolve(arg.annotation, f"{where}.{arg.arg}")
        fields.append(_Field(_check_name(arg.arg, where), annotation, where))
    return fields
