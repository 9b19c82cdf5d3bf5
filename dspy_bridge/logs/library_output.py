"""Drops what libraries print and log while they optimize: progress bars, prompts and answers, thousands of lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

_LIBRARIES = ("dspy", "gepa", "optuna", "py.warnings")


class _Stream:
    """`sys.stdout` or `sys.stderr`, whose writes are dropped where `dropped()`."""

    def __init__(self, stream: Any, dropped: Callable[[], bool]) -> None:
        self._stream = stream
        self._dropped = dropped

    def write(self, text: str) -> int:
        return len(text) if self._dropped() else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_installed = False


def drop_where(dropped: Callable[[], bool]) -> None:
    """Drop it from now on in threads for which `dropped()` is true at the time."""
    global _installed
    if _installed:
        return
    _installed = True
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            setattr(sys, name, _Stream(stream, dropped))
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not (record.name.startswith(_LIBRARIES) and dropped()))
