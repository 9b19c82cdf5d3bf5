"""What an optimization sees and changes of DSPy's own LM calls and evaluations. Imports DSPy."""

from __future__ import annotations

import copy
import functools
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from dspy_bridge.errors import BridgeError, OutputInvalid, Overloaded, hits_all
from dspy_bridge.lm import dspy_errors, dspy_internals
from dspy_bridge.lm.event_loop_lm import LoopLM
from dspy_bridge.lm.metering import endings
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
        # What a limit of the peer's own refuses comes too late for the deadline, and so would all that follows.
        if hits_all(error) or isinstance(error, Overloaded):
            assert error is not None
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
    return isinstance(lm, LoopLM) and not isinstance(lm, OfflineLM) and dspy_internals.TRANSPORT.there


def tolerant(adapter: dspy.Adapter) -> dspy.Adapter:
    """A copy of the adapter for an optimization: an answer that cannot be used fails its candidate alone.

    SIMBA and GEPA go on without the candidate. COPRO and MIPROv2 would raise, so they get the instruction as it was.
    """
    made = copy.copy(adapter)
    kind: Any = type(adapter)
    made.__class__ = _class_of(kind)
    return made


@functools.cache
def _class_of(kind: Any) -> Any:
    class Tolerant(kind):  # type: ignore[misc]
        def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
            kept = None if student.running.get() else _kept(signature, inputs)
            if kept is None:
                return super().__call__(lm, lm_kwargs, signature, demos, inputs)
            token = endings.keeping_whole.set(True)
            try:
                return super().__call__(lm, lm_kwargs, signature, demos, inputs)
            except Exception as error:
                if isinstance(dspy_errors.translate(error, []), OutputInvalid):
                    return [kept]
                raise
            finally:
                endings.keeping_whole.reset(token)

    Tolerant.__name__, Tolerant.__qualname__ = kind.__name__, kind.__qualname__
    return Tolerant


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
