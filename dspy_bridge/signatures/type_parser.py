"""Parses type names of Python, DSPex and DSPy to annotations. Nothing is evaluated or imported. Imports DSPy."""

from __future__ import annotations

import ast
import datetime
import re
from typing import Annotated, Any, Literal, Optional, Union

import dspy
import pydantic
from dspy.experimental import Citations, Document

from dspy_bridge.errors import InvalidArgs, short
from dspy_bridge.signatures.dspy_types import Code, code_in

# Python's parser holds the GIL: some 30 ms for 16,000 characters.
MAX_CHARS = 16_000

PROBABILITY = Annotated[float, pydantic.Field(ge=0, le=1)]

_OF_DSPY = (dspy.Image, dspy.Audio, dspy.File, dspy.History, dspy.Reasoning, Code, Citations, Document)
# A name of a language, which the prompt has.
_LANGUAGE = re.compile(r"[\w+#.-]{1,30}", re.ASCII)

_NAMES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (str, int, float, bool, bytes, list, tuple, set, frozenset)},
    **{kind.__name__: kind for kind in (datetime.datetime, datetime.date, datetime.time)},
    "List": list,
    "Tuple": tuple,
    "Set": set,
    "FrozenSet": frozenset,
    **dict.fromkeys(("dict", "Dict", "map"), dict[str, Any]),
    **dict.fromkeys(("Any", "any"), Any),
    "None": type(None),
    # DSPex's names.
    "string": str,
    "integer": int,
    "boolean": bool,
    "atom": str,
    **dict.fromkeys(("probability", "confidence_score"), PROBABILITY),
    "embedding": list[float],
    "reasoning_chain": list[str],
    # DSPy's own types.
    **{f(kind.__name__): kind for kind in _OF_DSPY for f in (str, str.lower)},
}
_CONTAINERS = {"list": list, "set": set, "frozenset": frozenset, "dict": dict, "tuple": tuple}
# How many types they take; any number, if it is not here.
_TAKES = {"list": 1, "set": 1, "frozenset": 1, "optional": 1, "dict": 2}
# DSPex's types, list<string>, dict<string,any>, union<integer|float>, have brackets of their own, and Python's may have
# their module. The strings in a Literal stay as they are.
_BRACKETS = {"<": "[", ">": "]"}
_STRING_OR_OTHER = re.compile(
    r"""('(?:[^'\\]|\\.)*'?|"(?:[^"\\]|\\.)*"?)|[<>]|(?<![\w.])(?:typing|dspy|datetime)\.""", re.DOTALL
)


def read_type(value: object, where: str) -> Any:
    """The annotation for a type in a request: a string, a JSON Schema, or None for `str`. Raises `InvalidArgs`."""
    if value is None:
        return str
    if isinstance(value, str):
        return resolve(parse(value.strip(), where, "eval", value).body, where)
    if isinstance(value, dict):
        # Most programs have none, and it takes 25 ms to import.
        from dspy_bridge.signatures import json_schema

        return json_schema.to_annotation(value, where)
    raise InvalidArgs(f"{where}: expected text such as str, list[int] or Literal['a', 'b'], or a JSON Schema object")


def parse(code: str, where: str, mode: str, shown: str) -> Any:
    """The syntax tree of `code`, in a mode of `ast.parse`. Raises `InvalidArgs`, which quotes `shown`."""
    if len(code) > MAX_CHARS:
        raise InvalidArgs(f"{where}: expected at most {MAX_CHARS} characters; a signature may be an object instead")
    code = _STRING_OR_OTHER.sub(lambda found: found[1] or _BRACKETS.get(found[0], ""), code)
    try:
        return ast.parse(code, mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        text = f"{where}: {short(shown)} cannot be read; expected a type such as str or list[int]"
        raise InvalidArgs(text) from None


def resolve(node: ast.expr, where: str) -> Any:
    """The annotation for a node of a syntax tree. Raises `InvalidArgs`."""
    try:
        return _type_of(node, where)
    except RecursionError:
        raise InvalidArgs(f"{where}: nested too deep") from None
    except TypeError:
        # list[…] and Union[…] check their arguments themselves.
        raise InvalidArgs(f"{where}: {short(ast.unparse(node))} is not a type") from None


def _type_of(node: ast.expr, where: str) -> Any:
    if isinstance(node, ast.Constant) and node.value is None:
        return type(None)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_type_of(node.left, where), _type_of(node.right, where)]  # noqa: UP007 - built from values
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        name = node.value.id.lower()
        if name == "code":
            return code_in(_language(node.slice, where))
        if name in _CONTAINERS or name in ("optional", "union", "literal"):
            return _generic(name, node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice], where)
    raise InvalidArgs(f"{where}: unknown type {short(ast.unparse(node))}; expected one such as str, int, list[str]")


def _generic(name: str, arguments: list[ast.expr], where: str) -> Any:
    if len(arguments) != _TAKES.get(name, len(arguments) or 1):
        takes = _TAKES.get(name, "some")
        raise InvalidArgs(f"{where}: {name}[…] takes {takes} type{'s' * (takes != 1)}, got {len(arguments)}")
    if name == "literal":
        return Literal[tuple(_literal(argument, where) for argument in arguments)]
    if name == "tuple" and len(arguments) == 2 and ast.unparse(arguments[1]) == "...":
        return tuple[_type_of(arguments[0], where), ...]  # type: ignore[misc]  # built from values
    types = tuple(_type_of(argument, where) for argument in arguments)
    if name == "optional":
        return Optional[types[0]]  # noqa: UP045 - built from values
    return Union[types] if name == "union" else _CONTAINERS[name][types]  # type: ignore[index]  # noqa: UP007


def _language(node: ast.expr, where: str) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and _LANGUAGE.fullmatch(node.value):
        return node.value
    raise InvalidArgs(f"{where}: expected the name of a language in quotes, such as code['java']")


def _literal(node: ast.expr, where: str) -> str | int | bool | None:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        value = ...
    if value is None or isinstance(value, (str, int, bool)):
        return value
    got = short(ast.unparse(node))
    raise InvalidArgs(f"{where}: Literal takes strings in quotes, whole numbers, booleans and None, got {got}")
