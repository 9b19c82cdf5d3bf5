"""DSPy's callback by which an optimization sees what DSPy does: LM calls and evaluations. Imports DSPy."""

from __future__ import annotations

from typing import Any

from dspy.utils.callback import BaseCallback

from dspy_bridge.errors import BridgeError, hits_all
from dspy_bridge.lm import dspy_errors, dspy_internals
from dspy_bridge.lm.event_loop_lm import LoopLM
from dspy_bridge.lm.offline.offline_lm import OfflineLM
from dspy_bridge.optimizing import student
from dspy_bridge.optimizing.candidates import Candidates
from dspy_bridge.optimizing.run import Run


class Watch(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    """Errors that would hit all calls end the run, whatever DSPy does with them."""

    def __init__(self, run: Run, candidates: Candidates, own_role: str) -> None:
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
        if not _requests_are_counted(instance):
            self._run.request()
        self._roles[call_id] = getattr(instance, "role", "" if student.running.get() else self._own_role)

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        role = self._roles.pop(call_id, "")
        if exception is not None and not isinstance(exception, Exception):
            return
        error = None if exception is None else dspy_errors.translate(exception, [])
        if role and isinstance(error, BridgeError):
            _name_role(error, f"optimize.{role}: ")
        if error is not None and hits_all(error):
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
            scores = [getattr(score, "score", score) for _, _, score in outputs.results]
            self._candidates.end_evaluation(program, [float(score) for score in scores], whole)


def _name_role(error: BridgeError, role: str) -> None:
    """Say in an error's text whose LM it was, once."""
    if not str(error).startswith(role):
        error.args = (f"{role}{error}", *error.args[1:])


def _requests_are_counted(lm: Any) -> bool:
    """Whether `transport` sees each of its requests, so that a call that the cache answers costs nothing."""
    return isinstance(lm, LoopLM) and not isinstance(lm, OfflineLM) and dspy_internals.ASYNC_TRANSPORT.there
