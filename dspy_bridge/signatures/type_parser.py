"""Parses type names of Python, DSPex and DSPy to annotations. Nothing is evaluated or imported. Imports DSPy."""

from __future__ import annotations

import ast
import datetime
import re
import typing
from typing import Annotated, Any, Literal, Optional, Union

import dspy
import pydantic

from dspy_bridge.errors import InvalidArgs, short
from dspy_bridge.signatures import json_schema

# No type written by hand is longer; keeps the parser far from Python's recursion limit.
MAX_TYPE_CHARS = 2000

PROBABILITY = Annotated[float, pydantic.Field(ge=0, le=1)]

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
    **{f(kind.__name__): kind for kind in (dspy.Image, dspy.Audio, dspy.File, dspy.History) for f in (str, str.lower)},
}
_DOTTED = {
    "typing": typing.__all__,
    "dspy": ["Image", "Audio", "File", "History"],
    "datetime": ["datetime", "date", "time"],
}
# Name to the minimum and maximum number of type arguments.
_GENERICS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("list", "List", "set", "Set", "frozenset", "FrozenSet", "Optional"), (1, 1)),
    **dict.fromkeys(("dict", "Dict"), (2, 2)),
    **dict.fromkeys(("tuple", "Tuple", "Union", "union", "Literal"), (1, 1000)),
}
# DSPex's types: list<string>, dict<string,any>, union<integer|float>. The strings in a Literal stay as they are.
_ANGLES = {"<": "[", ">": "]"}
_STRING_OR_ANGLE = re.compile(r"""'(?:[^'\\]|\\.)*'?|"(?:[^"\\]|\\.)*"?|[<>]""", re.DOTALL)
# Values of a Literal that an error repeats.
_MOST_SHOWN = 10
_CONTAINERS = {"list": list, "set": set, "frozenset": frozenset, "dict": dict, "tuple": tuple}


def read_type(value: object, where: str) -> Any:
    """The annotation for a type in a request: a string, a JSON Schema object, or None for `str`.

    Raises `InvalidArgs`, which names `where` or a place in it.
    """
    if value is None:
        return str
    if isinstance(value, str):
        return parse_type(value, where)
    if isinstance(value, dict):
        return json_schema.to_annotation(value, where)
    raise InvalidArgs(f"{where}: expected text such as str, list[int] or Literal['a', 'b'], or a JSON Schema object")


def parse_type(text: str, where: str) -> Any:
    """The annotation for a type string. Raises `InvalidArgs`, which names `where`."""
    if len(text) > MAX_TYPE_CHARS:
        raise InvalidArgs(f"{where}: expected a type of at most {MAX_TYPE_CHARS} characters")
    return resolve(parse(text.strip(), where, "eval", text).body, where)


def parse(code: str, where: str, mode: str, shown: str) -> Any:
    """The syntax tree of `code`, in a mode of `ast.parse`. Raises `InvalidArgs`, which quotes `shown`."""
    code = _STRING_OR_ANGLE.sub(lambda found: _ANGLES.get(found[0], found[0]), code)
    while True:
        try:
            return ast.parse(code, mode=mode)
        except SystemError:
            continue  # two threads parse at once: python/cpython issue 106905, up to 3.11
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
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = _name_of(node)
        if name in _NAMES:
            return _NAMES[name]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_type_of(node.left, where), _type_of(node.right, where)]  # noqa: UP007 - built from values
    elif isinstance(node, ast.Subscript):
        name = _name_of(node.value)
        if name in _GENERICS:
            arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return _generic(name, arguments, where)
    raise InvalidArgs(f"{where}: unknown type {short(ast.unparse(node))}; expected one such as str, int, list[str]")


def _generic(name: str, arguments: list[ast.expr], where: str) -> Any:
    least, most = _GENERICS[name]
    if not least <= len(arguments) <= most:
        raise InvalidArgs(f"{where}: {name}[…] takes {most} type{'s' if most > 1 else ''}, got {len(arguments)}")
    if name == "Literal":
        meant = _quoted(arguments)
        return Literal[tuple(_literal(argument, where, meant) for argument in arguments)]
    if name in ("tuple", "Tuple") and len(arguments) == 2 and _is_ellipsis(arguments[1]):
        return tuple[_type_of(arguments[0], where), ...]  # type: ignore[misc]  # built from values
    types = tuple(_type_of(argument, where) for argument in arguments)
    if name == "Optional":
        return Optional[types[0]]  # noqa: UP045 - built from values
    if name in ("Union", "union"):
        return Union[types]  # noqa: UP007 - built from values
    container: Any = _CONTAINERS[name.lower()]
    return container[types]


def _quoted(arguments: list[ast.expr]) -> str:
    """The Literal that is meant by one with names among its values, as the end of an error; empty for any other."""
    if len(arguments) > _MOST_SHOWN or not all(isinstance(node, (ast.Name, ast.Constant)) for node in arguments):
        return ""
    shown = ", ".join(repr(node.id) if isinstance(node, ast.Name) else ast.unparse(node) for node in arguments)
    return f"; did you mean Literal[{shown}]?"


def _literal(node: ast.expr, where: str, meant: str) -> str | int | bool | None:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        value = ...
    if value is None or isinstance(value, (str, int, bool)):
        return value
    raise InvalidArgs(
        f"{where}: Literal takes strings, whole numbers, booleans and None, got {short(ast.unparse(node))}{meant}"
    )


def _name_of(node: ast.expr) -> str:
    """The name of a node, without a module typing, dspy or datetime; empty for any other node."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.attr in _DOTTED.get(node.value.id, ()) else ""
    return ""


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...
