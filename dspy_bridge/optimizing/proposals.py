"""Keeps an answer that cannot be used from ending an optimization: its candidate fails alone. Imports DSPy.

SIMBA and GEPA go on without the candidate. COPRO and MIPROv2 would raise, so they get the instruction as it was.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import dspy

from dspy_bridge.errors import OutputInvalid
from dspy_bridge.lm import dspy_errors
from dspy_bridge.lm.metering import endings
from dspy_bridge.optimizing import student

_INSTRUCTION, _PREFIX = "proposed_instruction", "proposed_prefix_for_output_field"


def tolerant(adapter: dspy.Adapter) -> dspy.Adapter:
    """A copy of the adapter for an optimization."""
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
    if "basic_instruction" in inputs:
        values = {_INSTRUCTION: inputs["basic_instruction"], _PREFIX: ""}
    elif "attempted_instructions" in inputs:
        # COPRO's earlier candidates with their scores, the best one last.
        values = {_INSTRUCTION: "", _PREFIX: ""}
        for line in inputs["attempted_instructions"]:
            kind, _, text = line.partition(": ")
            if kind.startswith("Instruction #"):
                values[_INSTRUCTION] = text
            elif kind.startswith("Prefix #"):
                values[_PREFIX] = text
    else:
        return None
    names = signature.output_fields
    return {name: values[name] for name in names} if names.keys() <= values.keys() else None
