"""Checks of single command arguments. Pure; an error names the argument and what was expected."""

from __future__ import annotations

from dspy_bridge.errors import InvalidArgs, refuse_unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CREATE_ARGS = (
    "id",
    "signature",
    "program_type",
    "lm",
    "adapter",
    "config",
    "options",
    "tools",
    "demos",
    "state",
    "state_path",
    "lazy",
)
# As the modules of Elixir programs have them, beside it.
_IN_SIGNATURE = ("inputs", "outputs", "instructions")


def check_definition(args: dict[str, Any]) -> None:
    """The arguments of `create_program`, as far as that is possible without DSPy. Raises `InvalidArgs`."""
    for name in _IN_SIGNATURE:
        if name in args:
            raise InvalidArgs(f"{name}: belongs into signature, an object with inputs, outputs and instructions")
    refuse_unknown(args, _CREATE_ARGS)
    optional_object(args, "config")
    optional_lm(args)


def text(args: dict[str, Any], name: str) -> str:
    """A required string, not empty. Raises `InvalidArgs`."""
    value = args.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidArgs(f"{name}: expected text")
    return value


def optional_object(args: dict[str, Any], name: str) -> dict[str, Any] | None:
    """An object; None by default. Raises `InvalidArgs`."""
    value = args.get(name)
    if value is not None and not isinstance(value, dict):
        raise InvalidArgs(f"{name}: expected an object")
    return value


def optional_lm(args: dict[str, Any]) -> str | dict[str, Any] | None:
    """`lm`: a model's name, or an object with it; None by default. Raises `InvalidArgs`."""
    value = args.get("lm")
    if value is not None and not isinstance(value, (str, dict)):
        raise InvalidArgs('lm: expected text such as "openai/gpt-4o-mini", or an object with model')
    return value


def flag(args: dict[str, Any], name: str) -> bool:
    """A boolean; false by default. Raises `InvalidArgs`."""
    value = args.get(name, False)
    if not isinstance(value, bool):
        raise InvalidArgs(f"{name}: expected true or false")
    return value


def program_ids(args: dict[str, Any]) -> list[str] | None:
    """`program_ids`; None by default. Raises `InvalidArgs`."""
    ids = args.get("program_ids")
    if ids is not None and not (isinstance(ids, list) and all(isinstance(id, str) for id in ids)):
        raise InvalidArgs("program_ids: expected a list of strings")
    return ids


def count(args: dict[str, Any], name: str, most: int | None = None) -> int | None:
    """A whole number from 1 to `most`; None by default. Raises `InvalidArgs`."""
    value = args.get(name)
    if value is not None and not (type(value) is int and value >= 1 and (most is None or value <= most)):
        raise InvalidArgs(f"{name}: expected a whole number {'of at least 1' if most is None else f'from 1 to {most}'}")
    return value


def milliseconds(args: dict[str, Any], name: str) -> float | None:
    """A number greater than 0; None by default. Raises `InvalidArgs`."""
    value = args.get(name)
    if value is not None and not (type(value) in (int, float) and value > 0):
        raise InvalidArgs(f"{name}: expected a number of milliseconds greater than 0")
    return value
