"""Ends the sandboxes of a cancelled call, and creates them. Imports DSPy."""

from __future__ import annotations

import contextlib
import threading
from contextvars import ContextVar
from typing import Any

import dspy

from dspy_bridge.lm import dspy_internals
from dspy_bridge.runtime import worker_threads
from dspy_bridge.runtime.worker_threads import Job

# A sandbox that is starting has no process to kill yet.
_AGAIN_SECONDS = 0.05


class Ending:
    """Ends the sandboxes of one call, from any thread."""

    def __init__(self) -> None:
        # The call's thread has returned: nothing is left to end.
        self.returned = threading.Event()

    def comes_with(self, job: Job, interpreter: Any) -> None:
        """End `interpreter`, in a thread, when `job` is given up."""
        if not isinstance(interpreter, dspy.PythonInterpreter):
            # Others, as DSPy's LocalInterpreter, cannot be ended while they start.
            interpreter.start()
        job.on_give_up(lambda: threading.Thread(target=self._end, args=(interpreter,), daemon=True).start())

    def _end(self, interpreter: Any) -> None:
        while not self.returned.is_set():
            if isinstance(interpreter, dspy.PythonInterpreter):
                # Its `shutdown` sends a message, which a busy sandbox does not read.
                process = getattr(interpreter, dspy_internals.SANDBOX_PROCESS.attribute, None)
                if process is not None:
                    process.kill()
            else:
                with contextlib.suppress(Exception):  # user code; no caller is left
                    interpreter.shutdown()
            self.returned.wait(_AGAIN_SECONDS)


# Of the call that this thread runs.
current: ContextVar[Ending] = ContextVar("ending")


class Factory:
    """Creates the interpreters of a module, of the kind that `dspy.configure(interpreter_factory=…)` chose."""

    @property
    def execution_instructions(self) -> str:
        """The sentence about the sandbox in RLM's prompt."""
        return str(getattr(self._chosen(), "execution_instructions", ""))

    def __call__(self) -> Any:
        interpreter = self._chosen()()
        job = worker_threads.current.get()
        if job is not None:
            current.get().comes_with(job, interpreter)
        return interpreter

    @staticmethod
    def _chosen() -> Any:
        return dspy.settings.get("interpreter_factory") or dspy.PythonInterpreter
