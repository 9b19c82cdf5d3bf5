"""Arguments of a command, each checked once. Pure; errors name the argument and what was expected."""

from __future__ import annotations

from dspy_bridge.errors import InvalidArgs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def text(args: dict[str, Any], name: str) -> str:
    """An argument that must be there, a text that is not empty. Raises `InvalidArgs`."""
    value = args.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidArgs(f"{name}: expected text")
    return value


def optional_object(args: dict[str, Any], name: str) -> dict[str, Any] | None:
    """An object, or None where there is none. Raises `InvalidArgs`."""
    value = args.get(name)
    if value is not None and not isinstance(value, dict):
        raise InvalidArgs(f"{name}: expected an object")
    return value


def flag(args: dict[str, Any], name: str) -> bool:
    """True or false; false where it is not there. Raises `InvalidArgs`."""
    value = args.get(name, False)
    if not isinstance(value, bool):
        raise InvalidArgs(f"{name}: expected true or false")
    return value


def program_ids(args: dict[str, Any]) -> list[str] | None:
    """Ids of programs, or None where they are not given. Raises `InvalidArgs`."""
    ids = args.get("program_ids")
    if ids is not None and not (isinstance(ids, list) and all(isinstance(id, str) for id in ids)):
        raise InvalidArgs("program_ids: expected a list of texts")
    return ids
