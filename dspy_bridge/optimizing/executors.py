"""How DSPy runs an optimizer's examples: each once, however long it takes, and without a progress bar. Imports DSPy.

DSPy runs the last ones again that take 120 s. A bar that is not finished is drawn by another thread, or by the garbage
collector, which nobody can tell from the application's own output.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from dspy_bridge.lm import dspy_internals
from dspy_bridge.optimizing import run as runs


def install(optimizer: str) -> None:
    """Change DSPy so, once in a process."""
    dspy_internals.EXECUTE.wrap(_each_once)
    dspy_internals.BOOTSTRAP_BAR.wrap(lambda _tqdm: types.SimpleNamespace(tqdm=lambda examples: examples))
    if optimizer == "gepa":
        dspy_internals.GEPA_BAR.wrap(lambda tqdm: functools.partial(tqdm, disable=True))


def _each_once(execute: Any) -> Any:
    @functools.wraps(execute)
    def executed(self: Any, function: Any, data: Any) -> Any:
        if runs.current() is not None:
            self.timeout = 0
            self.disable_progress_bar = True
        return execute(self, function, data)

    return executed
