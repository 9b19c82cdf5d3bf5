"""What DSPy's optimizers are given: the program and its metric, in threads, callbacks, an adapter. Imports DSPy."""

from __future__ import annotations

import copy
import functools
from contextvars import ContextVar
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from dspy_bridge.errors import BridgeError, InvalidArgs, OutputInvalid, Overloaded, hits_all
from dspy_bridge.lm import dspy_errors, dspy_internals
from dspy_bridge.lm.event_loop_lm import LoopLM
from dspy_bridge.lm.metering import endings
from dspy_bridge.lm.offline.offline_lm import OfflineLM
from dspy_bridge.optimizing import run as runs
from dspy_bridge.optimizing.candidates import Candidates
from dspy_bridge.programs.program import Program
from dspy_bridge.programs.scores import Metric
from dspy_bridge.runtime import worker_threads

# A run of the program that fails so counts with the score 0, as in an evaluation. Others end the optimization.
_COUNTED = ("lm_error", "output_invalid", "timeout", "tool_error")

# Whether a run of the program is under way in this context, and not the optimizer's own code.
_running: ContextVar[bool] = ContextVar("running", default=False)


class Student:
    """The program that a run optimizes, and its metric; found by the copies that DSPy makes of the program's module."""

    def __init__(self, program: Program, metric: Metric, run: runs.Run) -> None:
        self.program = program
        # What the metric gets of each `dspy.Example`, by its id.
        self._shown: dict[int, dict[str, Any]] = {}
        self._metric = metric
        self._run = run
        self._succeeded = False
        self._failed = 0

    def examples(self, inputs: list[Any], expected: list[Any] | None, where: str) -> list[dspy.Example]:
        """As `Program.examples`."""
        read = self.program.examples(self._metric, inputs, expected, where)
        self._shown.update((id(example), shown) for example, shown in read)
        return [example for example, _ in read]

    def module(self) -> dspy.Module:
        """The program's module, with the class that optimizers need. It is the program's own from now on."""
        module: Any = self.program.runner.module
        module.__class__ = _student_of(module.__class__)
        return module

    def metric(self, optimizer: str, candidates: Candidates) -> Any:
        """The metric, in the form in which the optimizer calls it."""

        def score(example: Any, prediction: Any, trace: Any = None) -> float:
            # There is a trace while they look for demos.
            score, _ = self._ask(example, prediction, "score" if trace is None else "bootstrap")
            if trace is None:
                candidates.scored(None, example, score)
            return score

        def simba(example: Any, prediction: Any) -> Any:
            # Also called for runs that failed.
            score, feedback = (0.0, None) if prediction is None else self._ask(example, prediction, "score")
            candidates.scored(self._run.here.program, example, score)
            return score if feedback is None else dspy.Prediction(score=score, feedback=feedback)

        def gepa(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
            # For feedback on one predictor, or for a score.
            if pred_name is None:
                return score(gold, pred)
            _, inputs, outputs = pred_trace[0]
            predictor = {"name": pred_name, "inputs": dict(inputs), "outputs": dict(outputs)}
            of_it, feedback = self._ask(gold, pred, "feedback", predictor)
            return of_it if feedback is None else dspy.Prediction(score=of_it, feedback=feedback)

        return {"simba": simba, "gepa": gepa}.get(optimizer, score)

    def _ask(
        self, example: Any, prediction: Any, purpose: str, predictor: dict[str, Any] | None = None
    ) -> tuple[float, str | None]:
        with self._run.entered():
            try:
                outputs = self.program.outputs(prediction)
            except OutputInvalid:
                return 0.0, None  # as in an evaluation
            self._run.count_metric_call()
            asked = self._metric.score(self._shown[id(example)], outputs, self._run.call, purpose, predictor)
            try:
                return worker_threads.current_job().on_loop(asked)
            except Exception as error:
                # DSPy would go on with a score of 0.
                self._run.end(error)
                raise runs.Ended from error

    def call(self, module: dspy.Module, call: Any) -> Any:
        """`call` the module, a copy of the program's."""
        with self._run.entered():
            self._run.here.program = module
            outer = _running.set(True)
            try:
                result = call()
            except Exception as error:
                if (ends := self._ends(error)) is None:
                    raise
                self._run.end(ends)
                raise runs.Ended from error
            finally:
                _running.reset(outer)
            self._succeeded = True
            return result

    def _ends(self, error: Exception) -> BaseException | None:
        """The error that ends the run, if this one does. `error`: of a run of the program."""
        if isinstance(error, (TypeError, ValueError)) and isinstance(error.__context__, dspy.AdapterParseError):
            # DSPy's code for GEPA fails itself for some answers that cannot be read.
            error = error.__context__
        known = dspy_errors.translate(error, [])
        if hits_all(known):
            return known
        if isinstance(known, BridgeError) and known.error_type in _COUNTED:
            return None
        # The code of a user's module may raise anything for an answer that it cannot use.
        self._failed += 1
        goes_on = self._succeeded or self._failed <= 10
        return None if goes_on and not self.program.of_dspy and not isinstance(known, InvalidArgs) else known


@functools.cache
def _student_of(kind: Any) -> Any:
    """A subclass whose calls have the run's context. Optimizers read its source, and find that of `kind`."""

    class Optimized(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **values: Any) -> Any:
            call = functools.partial(super().__call__, *args, **values)
            run = runs.current()
            return call() if run is None else run.student.call(self, call)

        def forward(self, *args: Any, **values: Any) -> Any:
            run = runs.current()
            if run is None or args:
                return super().forward(*args, **values)
            return run.student.program.runner.forward(kind, self, values)

    return _named_as(kind, Optimized)


def _named_as(kind: Any, made: Any) -> Any:
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(made, attribute, getattr(kind, attribute))
    return made


class Watch(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    """Errors that would hit all calls end the run, whatever DSPy does with them."""

    def __init__(self, run: runs.Run, candidates: Candidates, own_role: str) -> None:
        """`own_role`: as what the optimizer's own code asks an LM that was not given for a role."""
        self._run = run
        self._candidates = candidates
        self._own_role = own_role
        # Of LM calls under way, by DSPy's ids.
        self._roles: dict[str, str] = {}
        # Evaluations under way, by DSPy's ids of the calls: the program, and whether it is scored on the whole set.
        self._evaluations: dict[str, tuple[Any, bool]] = {}

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._run.check()

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._run.check()
        # Of other LMs `transport` sees each request, so that a call that the cache answers costs nothing.
        if not isinstance(instance, LoopLM) or isinstance(instance, OfflineLM) or not dspy_internals.TRANSPORT.there:
            self._run.request()
        self._roles[call_id] = getattr(instance, "role", "" if _running.get() else self._own_role)

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        role = self._roles.pop(call_id, "")
        if exception is not None and not isinstance(exception, Exception):
            return
        error = None if exception is None else dspy_errors.translate(exception, [])
        # Its text says whose LM it was, once.
        where = f"optimize.{role}: "
        if role and isinstance(error, BridgeError) and not str(error).startswith(where):
            error.args = (f"{where}{error}", *error.args[1:])
        # What a limit of the peer's own refuses comes too late for the deadline, and so would all that follows.
        if error is not None and (hits_all(error) or isinstance(error, Overloaded)):
            self._run.end(error)
        self._run.lm_answered(role, error)
        self._candidates.report()

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        given = inputs.get("devset")
        examples = instance.devset if given is None else given
        self._evaluations[call_id] = inputs["program"], len(examples) >= len(instance.devset)
        self._candidates.begin_evaluation(len(examples))

    def on_evaluate_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        program, whole = self._evaluations.pop(call_id)
        if exception is None:
            scores = [float(getattr(score, "score", score)) for _, _, score in outputs.results]
            self._candidates.end_evaluation(program, scores, whole)


def tolerant(adapter: dspy.Adapter) -> dspy.Adapter:
    """A copy of the adapter for an optimization: an answer that cannot be used fails its candidate alone.

    SIMBA and GEPA go on without the candidate. COPRO and MIPROv2 would raise, so they get the instruction as it was.
    """
    made: Any = copy.copy(adapter)
    made.__class__ = _tolerant_of(made.__class__)
    return made


@functools.cache
def _tolerant_of(kind: Any) -> Any:
    class Tolerant(kind):  # type: ignore[misc]
        def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
            kept = None if _running.get() else _kept(signature, inputs)
            token = endings.keeping_whole.set(endings.keeping_whole.get() or kept is not None)
            try:
                return super().__call__(lm, lm_kwargs, signature, demos, inputs)
            except Exception as error:
                if kept is not None and isinstance(dspy_errors.translate(error, []), OutputInvalid):
                    return [kept]
                raise
            finally:
                endings.keeping_whole.reset(token)

    return _named_as(kind, Tolerant)


def _kept(signature: Any, inputs: dict[str, Any]) -> dict[str, str] | None:
    """The outputs of one who proposes what there is; None if it is not asked for a proposal."""
    # COPRO's earlier candidates with their scores, the best one last.
    attempted = [line.partition(": ") for line in inputs.get("attempted_instructions", ())]
    texts = {kind.partition(" #")[0]: text for kind, _, text in attempted}
    values = {
        "proposed_instruction": inputs.get("basic_instruction", texts.get("Instruction")),
        "proposed_prefix_for_output_field": texts.get("Prefix", ""),
    }
    asked = signature.output_fields.keys() <= values.keys() and values["proposed_instruction"] is not None
    return {name: values[name] for name in signature.output_fields} if asked else None
