"""Rewards of best_of_n and refine: a tool of the caller, or a field and its wanted value. Imports DSPy."""

from __future__ import annotations

import sys
from typing import Any

import dspy
import jiter

from dspy_bridge.errors import InvalidArgs, ToolFailed
from dspy_bridge.lm import lm_call
from dspy_bridge.runtime import worker_threads
from dspy_bridge.wire.json_values import encode_value


class Reward:
    """`reward(inputs, prediction)`, called in a worker thread. `text` describes it to an LM."""

    def __init__(self, tool: str | None, field: str | None, equals: Any) -> None:
        self.tool = tool
        self._field = field
        self._equals = equals
        self.text = f"{field} == {encode_value(equals).decode()}" if tool is None else f"{tool}(inputs, outputs)"

    def __call__(self, inputs: dict[str, Any], prediction: dspy.Prediction) -> float:
        """Raises `ToolFailed`."""
        outputs = plain(dict(prediction.items()))
        if self.tool is None:
            return 1.0 if outputs.get(self._field) == self._equals else 0.0
        fields = plain({name: value for name, value in inputs.items() if name != "config"})
        job = worker_threads.current.get()
        assert job is not None, "rewards are given in worker threads"
        value = job.on_loop(lm_call.run().call.call_tool(self.tool, {"inputs": fields, "outputs": outputs}))
        reward = number(value)
        if reward is None:
            raise ToolFailed(f"{self.tool}: expected a number as the reward")
        return reward


def read(given: dict[str, Any] | None, signature: type[dspy.Signature]) -> Reward:
    """The reward of `options.reward`. Raises `InvalidArgs`."""
    wanted = 'expected {"tool": name} or {"field": name, "equals": value}'
    if given is None:
        raise InvalidArgs(f"options.reward: missing; {wanted}")
    if by_tool(given, "equals", signature, "options.reward", wanted):
        return Reward(given["tool"], None, None)
    return Reward(None, given["field"], given["equals"])


def by_tool(given: dict[str, Any], compares: str, signature: type[dspy.Signature], where: str, wanted: str) -> bool:
    """Whether `given` is `{"tool": name}`; else it is `{"field": name, compares: …}`. Raises `InvalidArgs`."""
    if given.keys() == {"tool"}:
        if not isinstance(given["tool"], str) or not given["tool"]:
            raise InvalidArgs(f"{where}.tool: expected the name of a tool")
        return True
    if given.keys() != {"field", compares}:
        raise InvalidArgs(f"{where}: {wanted}")
    if given["field"] not in list(signature.output_fields):  # may be unhashable
        raise InvalidArgs(f"{where}.field: expected one of {', '.join(signature.output_fields)}")
    return False


def number(value: Any) -> float | None:
    """A finite number that a tool gave, or None. Many are booleans: they count as 1 and 0."""
    if not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def plain(values: dict[str, Any]) -> Any:
    """The values as a reply would contain them."""
    return jiter.from_json(encode_value(values))
