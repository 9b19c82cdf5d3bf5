"""Metrics: what a prediction is worth, by a tool of the caller or by one output field. Imports DSPy."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import dspy
import pydantic
from dspy.evaluate import EM, normalize_text

from dspy_bridge.caller import Caller
from dspy_bridge.errors import InvalidArgs, ToolFailed
from dspy_bridge.programs import rewards, saved_state
from dspy_bridge.signatures import media
from dspy_bridge.wire.json_values import encode_value

MATCHES = ("equals", "exact_match", "f1", "contains")
_WANTED = f'expected {{"tool": name}} or {{"field": name, "match": one of {", ".join(MATCHES)}}}'


class Metric:
    """The score of a prediction. `tool`: the caller's, which is asked; else the value of `field` is compared."""

    def __init__(self, tool: str | None, field: str, match: str) -> None:
        self.tool = tool
        self.field = field
        self._match = match

    async def score(
        self,
        example: dict[str, Any],
        outputs: dict[str, Any],
        call: Caller,
        purpose: str = "score",
        predictor: dict[str, Any] | None = None,
    ) -> tuple[float, str | None]:
        """The score, and the tool's feedback, if it has any. `example`: its inputs and expected values.

        `predictor`: the name, the inputs and the outputs of the one that feedback is for. On the event loop. Raises
        `ToolFailed`.
        """
        if self.tool is None:
            return self._compare(rewards.plain({self.field: outputs.get(self.field)})[self.field], example), None
        asked = {"example": example, "prediction": outputs, "purpose": purpose}
        if predictor is not None:
            asked["predictor"] = predictor
        return _read_score(await call.call_tool(self.tool, asked), self.tool)

    def _compare(self, got: Any, example: dict[str, Any]) -> float:
        wanted = example[self.field]
        if self._match == "equals":
            return float(_same(got, wanted))
        if got is None:
            return 0.0
        got, wanted = _text(got), _text(wanted)
        if self._match == "contains":
            return float(wanted in got)
        if self._match == "exact_match":
            return float(EM(got, [wanted]))
        return _f1(normalize_text(got).split(), normalize_text(wanted).split())


def read(given: dict[str, Any], signature: type[dspy.Signature]) -> Metric:
    """The metric of the argument `metric`. Raises `InvalidArgs`."""
    if rewards.by_tool(given, "match", signature, "metric", _WANTED):
        return Metric(given["tool"], "", "")
    if given["match"] not in MATCHES:
        raise InvalidArgs(f"metric.match: expected one of {', '.join(MATCHES)}")
    return Metric(None, given["field"], given["match"])


def read_examples(
    metric: Metric,
    inputs: list[Any],
    expected: list[Any] | None,
    signature: type[dspy.Signature],
    files_dir: str | None,
    where: str = "expected",
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What the metric gets of each item, its inputs and what is expected of it; and the expected outputs as values.

    Output fields in `expected` are checked; other keys are for the metric alone. Raises `InvalidArgs` or `NotAllowed`.
    """
    if expected is None:
        if metric.tool is None:
            raise InvalidArgs(f"{where}: missing; the metric compares {metric.field} with it")
        return [(item if isinstance(item, dict) else {}, {}) for item in inputs]
    fields = {
        name: pydantic.TypeAdapter(media.accepting(field.rebuild_annotation(), files_dir))
        for name, field in signature.output_fields.items()
    }
    examples = []
    for index, (item, wanted) in enumerate(zip(inputs, expected, strict=True)):
        here = f"{where}[{index}]"
        if not isinstance(wanted, dict):
            raise InvalidArgs(f"{here}: expected an object of output fields, and what else the metric needs")
        for name in wanted:
            if name in signature.input_fields:
                raise InvalidArgs(f"{here}.{name}: an input; expected output fields, and what else the metric needs")
        of_program = {name: wanted[name] for name in wanted if name in fields}
        values = saved_state.read_fields(of_program, fields, here)
        if metric.tool is None:
            if metric.field not in wanted:
                raise InvalidArgs(f"{here}.{metric.field}: missing; the metric compares with it")
            wanted = rewards.plain({metric.field: values[metric.field]})
        examples.append(({**(item if isinstance(item, dict) else {}), **wanted}, values))
    return examples


def mean(scores: list[float]) -> float:
    """Of at least one score."""
    try:
        return math.fsum(scores) / len(scores)
    except OverflowError:
        return math.fsum(score / len(scores) for score in scores)


def _read_score(value: Any, tool: str) -> tuple[float, str | None]:
    feedback = None
    if isinstance(value, dict) and "score" in value and value.keys() <= {"score", "feedback"}:
        feedback = value.get("feedback")
        value = value["score"]
    score = rewards.number(value)
    if score is None or not (feedback is None or isinstance(feedback, str)):
        raise ToolFailed(f'{tool}: expected a number, a boolean or {{"score": number, "feedback": text}} as the score')
    return score, feedback


def _f1(got: list[str], wanted: list[str]) -> float:
    """As DSPy's, which it does not export, and which prints a warning if there are no words."""
    common = sum((Counter(got) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(got), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


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
