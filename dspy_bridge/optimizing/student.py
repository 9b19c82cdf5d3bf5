"""Makes a module that optimizers can call in their threads out of a loaded program's. Imports DSPy."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import dspy

from dspy_bridge.errors import InvalidArgs, LMFailed, OutputInvalid, Overloaded, TimedOut, ToolFailed, hits_all
from dspy_bridge.lm import dspy_errors
from dspy_bridge.optimizing import run as runs
from dspy_bridge.programs.program import Program

# A run of the program that fails so counts with the score 0, as in an evaluation. Others end the optimization.
_COUNTED = (LMFailed, OutputInvalid, Overloaded, TimedOut, ToolFailed)

# Whether a run of the program is under way in this context, and not the optimizer's own code.
running: ContextVar[bool] = ContextVar("running", default=False)


class Student:
    """What a run knows of the program that it optimizes; found by the copies that DSPy makes of its module."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._succeeded = False
        self._failed = 0

    def module(self) -> dspy.Module:
        """The program's module, with the class that optimizers need. It is the program's own from now on."""
        module = self.program.runner.module
        kind: Any = type(module)
        module.__class__ = _class_of(kind)
        return module

    def failed(self, error: Exception) -> BaseException | None:
        """The error that ends the run, if this one does. `error`: of a run of the program."""
        if isinstance(error, (TypeError, ValueError)) and isinstance(error.__context__, dspy.AdapterParseError):
            # DSPy's code for GEPA fails itself for some answers that cannot be read.
            error = error.__context__
        known = dspy_errors.translate(error, [])
        if hits_all(known):
            return known
        if isinstance(known, _COUNTED):
            return None
        # The code of a user's module may raise anything for an answer that it cannot use.
        if not self.program.of_dspy and not isinstance(known, InvalidArgs) and (self._succeeded or self._failed < 10):
            self._failed += 1
            return None
        return known

    def succeeded(self) -> None:
        self._succeeded = True


@functools.cache
def _class_of(kind: Any) -> Any:
    """A subclass whose calls have the run's context. Optimizers read its source, and find that of `kind`."""

    class Optimized(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **values: Any) -> Any:
            run = runs.current()
            if run is None:
                return super().__call__(*args, **values)
            with run.entered():
                run.here.program = self
                outer = running.set(True)
                try:
                    result = super().__call__(*args, **values)
                except Exception as error:
                    ends = run.student.failed(error)
                    if ends is not None:
                        run.end(ends)
                        raise runs.Ended from error
                    raise
                finally:
                    running.reset(outer)
                run.student.succeeded()
                return result

        def forward(self, *args: Any, **values: Any) -> Any:
            run = runs.current()
            if run is None or args:
                return super().forward(*args, **values)
            return run.student.program.runner.forward(kind, self, values)

    Optimized.__name__, Optimized.__qualname__ = kind.__name__, kind.__qualname__
    Optimized.__module__, Optimized.__doc__ = kind.__module__, kind.__doc__
    return Optimized
