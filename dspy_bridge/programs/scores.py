"""What a prediction is worth, by a tool of the caller or by one output field. Imports DSPy.

Metrics of evaluations and optimizations compare it with what is expected; rewards of best_of_n and refine need not.
"""

from __future__ import annotations

from typing import Any

import dspy
import jiter
from dspy.evaluate import metrics

from dspy_bridge.dispatch.call import Call
from dspy_bridge.errors import InvalidArgs, ToolFailed
from dspy_bridge.lm import lm_call
from dspy_bridge.runtime import worker_threads
from dspy_bridge.signatures import dspy_types, media, validation
from dspy_bridge.wire.json_values import encode_value

MATCHES = ("equals", "exact_match", "f1", "contains")
# What a value is compared by, in rewards and in metrics.
_COMPARES = {"equals": "value", "match": f"one of {', '.join(MATCHES)}"}


class Metric:
    """The score of a prediction. `tool`: the caller's, which is asked; if None, the value of `field` is compared."""

    def __init__(self, given: dict[str, Any], signature: type[dspy.Signature], files_dir: str | None) -> None:
        """`given`: the argument `metric`. `files_dir`: the folder for paths. Raises `InvalidArgs`."""
        self.tool, self.field, self._match = _read(given, "match", signature, "metric")
        if self.tool is None and self._match not in MATCHES:
            raise InvalidArgs(f"metric.match: expected one of {', '.join(MATCHES)}")
        self._signature = signature
        self._files_dir = files_dir

    async def score(
        self,
        example: dict[str, Any],
        outputs: dict[str, Any],
        call: Call,
        purpose: str = "score",
        predictor: dict[str, Any] | None = None,
    ) -> tuple[float, str | None]:
        """The score, and the tool's feedback, if it has any. `example`: its inputs and expected values.

        `predictor`: the name, the inputs and the outputs of the one that feedback is for. On the event loop. Raises
        `ToolFailed`.
        """
        if self.tool is None:
            return self._compare(_plain(outputs.get(self.field)), example[self.field]), None
        asked = {"example": example, "prediction": outputs, "purpose": purpose}
        if predictor is not None:
            asked["predictor"] = predictor
        return _read_score(await call.call_tool(self.tool, asked), self.tool)

    def examples(
        self, inputs: list[Any], expected: list[Any] | None, where: str
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What `score` gets of each item, its inputs and what is expected of it; and the expected outputs as values.

        Output fields in `expected` are checked; other keys are for the metric alone. In a thread: it may take long.
        Raises `InvalidArgs` or `NotAllowed`.
        """
        if expected is None:
            if self.tool is None:
                raise InvalidArgs(f"{where}: missing; the metric compares {self.field} with it")
            return [(item if isinstance(item, dict) else {}, {}) for item in inputs]
        fields = media.validators(self._signature.output_fields, self._files_dir)
        examples = []
        for index, (item, wanted) in enumerate(zip(inputs, expected, strict=True)):
            here = f"{where}[{index}]"
            if not isinstance(wanted, dict):
                raise InvalidArgs(f"{here}: expected an object of output fields, and what else the metric needs")
            if wrong := [name for name in wanted if name in self._signature.input_fields]:
                text = "an input; expected output fields, and what else the metric needs"
                raise InvalidArgs(f"{here}.{wrong[0]}: {text}")
            of_program = {name: wanted[name] for name in wanted if name in fields}
            values = validation.read_values(of_program, fields, here)
            if self.tool is None:
                if self.field not in wanted:
                    raise InvalidArgs(f"{here}.{self.field}: missing; the metric compares with it")
                wanted = {self.field: _plain(dspy_types.for_replies(values)[self.field])}
            examples.append(({**(item if isinstance(item, dict) else {}), **wanted}, values))
        return examples

    def _compare(self, got: Any, wanted: Any) -> float:
        if self._match == "equals" or got is None:
            return float(self._match == "equals" and _same(got, wanted))
        got, wanted = _text(got), _text(wanted)
        if self._match == "contains":
            return float(wanted in got)
        return float((metrics.EM if self._match == "exact_match" else metrics.F1)(got, [wanted]))


class Reward:
    """`reward(inputs, prediction)`, called in a worker thread. `text` describes it to an LM."""

    def __init__(self, given: dict[str, Any], signature: type[dspy.Signature]) -> None:
        """`given`: `options.reward`. Raises `InvalidArgs`."""
        self.tool, self._field, self._equals = _read(given, "equals", signature, "options.reward")
        by_field = f"{self._field} == {encode_value(self._equals).decode()}"
        self.text = by_field if self.tool is None else f"{self.tool}(inputs, outputs)"

    def __call__(self, inputs: dict[str, Any], prediction: dspy.Prediction) -> float:
        """Raises `ToolFailed`."""
        outputs = _plain(dspy_types.for_replies(prediction))
        if self.tool is None:
            return float(_same(outputs.get(self._field), self._equals))
        fields = _plain({name: value for name, value in inputs.items() if name != "config"})
        asked = lm_call.run().call.call_tool(self.tool, {"inputs": fields, "outputs": outputs})
        return _read_score(worker_threads.current_job().on_loop(asked), self.tool)[0]


def _read(
    given: dict[str, Any], compares: str, signature: type[dspy.Signature], where: str
) -> tuple[str | None, str, Any]:
    """The tool of `{"tool": name}`, or the field and the value of `{"field": name, compares: …}`."""
    if given.keys() == {"tool"}:
        if not isinstance(given["tool"], str) or not given["tool"]:
            raise InvalidArgs(f"{where}.tool: expected the name of a tool")
        return given["tool"], "", None
    if given.keys() != {"field", compares}:
        wanted = f'{{"tool": name}} or {{"field": name, "{compares}": {_COMPARES[compares]}}}'
        raise InvalidArgs(f"{where}: expected {wanted}")
    if given["field"] not in list(signature.output_fields):  # may be unhashable
        raise InvalidArgs(f"{where}.field: expected one of {', '.join(signature.output_fields)}")
    return None, given["field"], given[compares]


def _plain(value: Any) -> Any:
    """The value as a reply would contain it."""
    return jiter.from_json(encode_value(value))


def _read_score(value: Any, tool: str) -> tuple[float, str | None]:
    feedback = None
    if isinstance(value, dict) and "score" in value and value.keys() <= {"score", "feedback"}:
        feedback = value.get("feedback")
        value = value["score"]
    # Not a number so large that a sum is infinite. Booleans count as 1 and 0.
    if isinstance(value, (int, float)) and abs(value) <= 1e300 and isinstance(feedback, str | None):
        return float(value), feedback
    raise ToolFailed(f'{tool}: expected a number, a boolean or {{"score": number, "feedback": text}} as the score')


def _text(value: Any) -> str:
    return value if isinstance(value, str) else encode_value(value).decode()


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same. For Python true is 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
