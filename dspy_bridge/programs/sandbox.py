"""The sandboxes of an RLM's code, which end with their call. Imports DSPy."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import dspy

from dspy_bridge.errors import SetupFailed
from dspy_bridge.runtime import worker_threads

# A sandbox that is starting has no process to kill yet.
_AGAIN_SECONDS = 0.05

# Set once the call of this context has returned: nothing is left to end.
_returned: ContextVar[threading.Event] = ContextVar("returned")


def run(work: Callable[[], Any]) -> Any:
    """Run `work`, a call of an RLM, in this thread."""
    token = _returned.set(threading.Event())
    try:
        return work()
    except dspy.CodeInterpreterError as error:
        raise SetupFailed(f"the sandbox for the LM's code failed: {error}") from error
    finally:
        _returned.get().set()
        _returned.reset(token)


class Factory:
    """Creates the interpreters of a module, of the kind that `dspy.configure(interpreter_factory=…)` chose."""

    @property
    def execution_instructions(self) -> str:
        """The sentence about the sandbox in RLM's prompt."""
        return str(getattr(self._chosen(), "execution_instructions", ""))

    def __call__(self) -> Any:
        interpreter, returned = self._chosen()(), _returned.get()
        if not isinstance(interpreter, dspy.PythonInterpreter):
            # Others, as DSPy's LocalInterpreter, cannot be ended while they start.
            interpreter.start()
        thread = threading.Thread(target=_end, args=(interpreter, returned), daemon=True)
        worker_threads.current_job().on_give_up(thread.start)
        return interpreter

    @staticmethod
    def _chosen() -> Any:
        return dspy.settings.get("interpreter_factory") or dspy.PythonInterpreter


def _end(interpreter: Any, returned: threading.Event) -> None:
    while not returned.is_set():
        if isinstance(interpreter, dspy.PythonInterpreter):
            # Its `shutdown` sends a message, which a busy sandbox does not read.
            process = getattr(interpreter, "deno_process", None)
            if process is not None:
                process.kill()
        else:
            with contextlib.suppress(Exception):  # user code; no caller is left
                interpreter.shutdown()
        returned.wait(_AGAIN_SECONDS)
