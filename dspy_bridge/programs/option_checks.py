"""Checks of single options, of modules and of optimizers. Pure; each raises `ValueError` with what it expected."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def whole(least: int, most: int) -> Callable[[Any], Any]:
    """A whole number from `least` to `most`."""

    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return value

    return read


def size(value: Any) -> int:
    """A whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError("expected a whole number of at least 1")
    return value


def number(value: Any) -> float:
    """A number that a float can hold."""
    # JSON allows integers of 400 digits, which none can.
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise ValueError("expected a number")
    return float(value)
