"""Errors of validators, and their conversion to those of replies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic_core import PydanticCustomError

from dspy_bridge.errors import BridgeError, InvalidArgs, NotAllowed, refuse_unknown, step

_NOT_ALLOWED = "not_allowed"


def unfit(text: str) -> PydanticCustomError:
    """For a validator to raise: the value does not fit the type."""
    return PydanticCustomError("unfit", "{text}", {"text": text})


def not_allowed(text: str) -> PydanticCustomError:
    """For a validator to raise: the settings of this peer do not allow the value."""
    return PydanticCustomError(_NOT_ALLOWED, "{text}", {"text": text})


def describe(where: str, error: Exception) -> BridgeError:
    """An error of a validator as one of ours, without the value, which pydantic's text quotes."""
    if not isinstance(error, pydantic.ValidationError):
        return (NotAllowed if getattr(error, "type", "") == _NOT_ALLOWED else InvalidArgs)(f"{where}: {error}")
    found = error.errors(include_url=False, include_input=False, include_context=False)
    refused = next((one for one in found if one["type"] == _NOT_ALLOWED), None)
    first = refused or found[0]
    # Not pydantic's name for a member of a union.
    place = "".join(step(part) for part in first["loc"] if not str(part).startswith("function-"))
    text = f"{where}{place}: {first['msg']}"
    return InvalidArgs(text) if refused is None else NotAllowed(text)


def read_values(
    given: dict[str, Any], types: Mapping[str, pydantic.TypeAdapter[Any] | None], where: str, strict: bool | None = None
) -> dict[str, Any]:
    """The values, each as its type has it; None: any value is valid. Raises `InvalidArgs` or `NotAllowed`."""
    refuse_unknown(given, types, where)
    read = {}
    for name, value in given.items():
        validator = types[name]
        try:
            read[name] = value if validator is None else validator.validate_python(value, strict=strict)
        except (TypeError, ValueError) as error:
            raise describe(f"{where}.{name}", error) from None
    return read


def read_options(given: dict[str, Any], types: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of options, without conversions. Raises `InvalidArgs`, naming the option."""
    return read_values(given, {name: pydantic.TypeAdapter(kind) for name, kind in types.items()}, where, strict=True)
