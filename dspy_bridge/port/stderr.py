"""Lines on stderr without `logging`, whose import takes 10 ms."""

from __future__ import annotations

import os


def log(line: str) -> None:
    _write(f"dspy_bridge[{os.getpid()}]: {line}\n")


def refuse(why: str) -> int:
    """Write why the process does not start; returns its exit code."""
    _write(f"dspy_bridge: {why}\n")
    return 2


def _write(line: str) -> None:
    try:
        os.write(2, line.encode())
    except OSError:
        pass  # stderr is closed or nobody reads it; replies must not depend on it
