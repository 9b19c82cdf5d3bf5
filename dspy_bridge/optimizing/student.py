"""The program and the metric as DSPy's optimizers call them, in threads of their own. Imports DSPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import dspy

from dspy_bridge.errors import InvalidArgs, LMFailed, OutputInvalid, TimedOut, ToolFailed, hits_all
from dspy_bridge.lm import dspy_errors
from dspy_bridge.optimizing import run as runs
from dspy_bridge.programs.program import Program
from dspy_bridge.programs.scores import Metric
from dspy_bridge.runtime import worker_threads

# A run of the program that fails so counts with the score 0, as in an evaluation. Others end the optimization.
_COUNTED = (LMFailed, OutputInvalid, TimedOut, ToolFailed)

# Whether a run of the program is under way in this context, and not the optimizer's own code.
running: ContextVar[bool] = ContextVar("running", default=False)


class Student:
    """The program that a run optimizes, and its metric; found by the copies that DSPy makes of the program's module.

    `examples`: what the metric gets of each `dspy.Example`, by its id. `on_score`: called for each scored run.
    """

    def __init__(self, program: Program, metric: Metric, run: runs.Run) -> None:
        self.program = program
        self.examples: dict[int, dict[str, Any]] = {}
        self.on_score: Callable[[Any, Any, float], None] = lambda *_: None
        self._metric = metric
        self._run = run
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

    # The metric, in the forms in which optimizers call it.

    def score(self, example: Any, prediction: Any, trace: Any = None) -> float:
        """Of most optimizers. There is a trace while they look for demos."""
        if trace is not None:
            return self._ask(example, prediction, "bootstrap")[0]
        score, _ = self._ask(example, prediction, "score")
        self.on_score(None, example, score)
        return score

    def simba(self, example: Any, prediction: Any) -> Any:
        """Of SIMBA, which also calls it for runs that failed, and uses the feedback."""
        score, feedback = (0.0, None) if prediction is None else self._ask(example, prediction, "score")
        self.on_score(self._run.here.program, example, score)
        return score if feedback is None else dspy.Prediction(score=score, feedback=feedback)

    def gepa(self, gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        """Of GEPA, which asks for feedback on one predictor, or for a score."""
        if pred_name is None:
            return self.score(gold, pred)
        _, inputs, outputs = pred_trace[0]
        predictor = {"name": pred_name, "inputs": dict(inputs), "outputs": dict(outputs)}
        score, feedback = self._ask(gold, pred, "feedback", predictor)
        return score if feedback is None else dspy.Prediction(score=score, feedback=feedback)

    def _ask(
        self, example: Any, prediction: Any, purpose: str, predictor: dict[str, Any] | None = None
    ) -> tuple[float, str | None]:
        with self._run.entered():
            try:
                outputs = self.program.outputs(prediction)
            except OutputInvalid:
                return 0.0, None  # as in an evaluation
            self._run.count_metric_call()
            asked = self._metric.score(self.examples[id(example)], outputs, self._run.call, purpose, predictor)
            try:
                return worker_threads.current_job().on_loop(asked)
            except Exception as error:
                # DSPy would go on with a score of 0.
                self._run.end(error)
                raise runs.Ended from error


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
