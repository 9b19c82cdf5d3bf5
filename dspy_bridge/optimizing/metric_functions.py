"""The metric of an optimization in the forms in which DSPy's optimizers call it, in their threads. Imports DSPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dspy

from dspy_bridge.errors import OutputInvalid
from dspy_bridge.optimizing.run import Ended, Run
from dspy_bridge.programs.program import Program
from dspy_bridge.programs.scores import Metric
from dspy_bridge.runtime import worker_threads


class MetricFunctions:
    """`examples`: what the metric gets of each `dspy.Example`, by its id. `on_score`: called for each scored run."""

    def __init__(
        self,
        metric: Metric,
        program: Program,
        examples: dict[int, dict[str, Any]],
        run: Run,
        on_score: Callable[[Any, Any, float], None],
    ) -> None:
        self._metric = metric
        self._program = program
        self._examples = examples
        self._run = run
        self._on_score = on_score

    def score(self, example: Any, prediction: Any, trace: Any = None) -> float:
        """Of most optimizers. There is a trace while they look for demos."""
        if trace is not None:
            return self._ask(example, prediction, "bootstrap")[0]
        score, _ = self._ask(example, prediction, "score")
        self._on_score(None, example, score)
        return score

    def simba(self, example: Any, prediction: Any) -> Any:
        """Of SIMBA, which also calls it for runs that failed, and uses the feedback."""
        if prediction is None:
            score, feedback = 0.0, None
        else:
            score, feedback = self._ask(example, prediction, "score")
        self._on_score(self._run.here.program, example, score)
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
                outputs = self._program.outputs(prediction)
            except OutputInvalid:
                return 0.0, None  # as in an evaluation
            job = worker_threads.current.get()
            assert job is not None, "optimizations run in worker threads"
            self._run.count_metric_call()
            try:
                return job.on_loop(
                    self._metric.score(self._examples[id(example)], outputs, self._run.call, purpose, predictor)
                )
            except Exception as error:
                # DSPy would go on with a score of 0.
                self._run.end(error)
                raise Ended from error
