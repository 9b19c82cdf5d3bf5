"""What DSPy builds anew for each value or call, built once for each type or signature.

DSPy makes a signature for each step of a ReAct, a `TypeAdapter` for each value in a prompt, and the same system message
and response schema for each call. What is sent stays the same to the byte. The arguments of tools: `remote_tools`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import dspy
import pydantic

from dspy_bridge.lm import dspy_internals

# Types of all programs together, some KB each. Past it all are built again.
_MOST = 1_000
# Signatures of trajectories, one for each number of steps: of 60 steps they take some 25 MB.
_MOST_STEPS = 64


def per_type(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`make`, called once for each type, by its identity: `int | str` equals `str | int`, but has another schema."""
    # With the type, as its id belongs to another one after its end.
    made: dict[int, tuple[Any, Any]] = {}

    def get(kind: Any) -> Any:
        found = made.get(id(kind))
        if found is None:
            if len(made) >= _MOST:
                made.clear()
            found = made[id(kind)] = kind, make(kind)
        return found[1]

    return get


for _name in dspy_internals.TYPE_ADAPTERS:
    _name.replace(per_type(pydantic.TypeAdapter))


@dspy_internals.RESPONSE_MODEL.replace
@functools.lru_cache(_MOST)
def _response_model(*args: Any, **options: Any) -> Any:
    return dspy_internals.RESPONSE_MODEL.value(*args, **options)


# The signature only says in which order the fields are written.
_trajectory = functools.lru_cache(_MOST_STEPS)(lambda fields: dspy.Signature(f"{fields} -> x"))


@dspy_internals.FORMAT_TRAJECTORY.replace
def _format_trajectory(_agent: Any, trajectory: Any) -> Any:
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    return adapter.format_user_message_content(_trajectory(", ".join(trajectory)), trajectory)
