"""Evaluates a program: a batch whose results have scores. What is wrong is refused before an LM is asked."""

from __future__ import annotations

from dspy_bridge.errors import InvalidArgs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from dspy_bridge.dispatch.call import Call
    from dspy_bridge.programs.program import Program


class Given:
    """The arguments of an evaluation. `expected`: one object for each of the inputs, or None."""

    __slots__ = ("expected", "metric")

    def __init__(self, metric: dict[str, Any], expected: list[Any] | None) -> None:
        self.metric = metric
        self.expected = expected


def read(args: dict[str, Any], inputs: dict[str, Any] | list[Any]) -> Given | None:
    """The arguments of an evaluation among those of an `execute_program`, if it is one. Raises `InvalidArgs`."""
    metric, expected = args.get("metric"), args.get("expected")
    for name, value in (("metric", metric), ("expected", expected)):
        if value is not None and isinstance(inputs, dict):
            raise InvalidArgs(f"{name}: only for a list of inputs")
    if metric is None:
        if expected is not None:
            raise InvalidArgs("expected: only with a metric, which compares with it")
        return None
    if not isinstance(metric, dict):
        raise InvalidArgs("metric: expected an object with tool, or with field and match")
    if expected is not None and not isinstance(expected, list):
        raise InvalidArgs("expected: expected a list of objects, one for each of the inputs")
    if expected is not None and len(expected) != len(inputs):
        raise InvalidArgs(f"expected: expected {len(inputs)} objects, one for each of the inputs, got {len(expected)}")
    return Given(metric, expected)


async def run(
    given: Given,
    program: Program,
    inputs: list[Any],
    work: Callable[[Any], Coroutine[Any, Any, Any]],
    call: Call,
    *,
    stream: bool,
    max_concurrency: int | None,
    item_timeout_ms: float | None,
) -> dict[str, Any]:
    """`{"score", "failed", "results"}`: those of a batch, each with its score, and the mean of all scores.

    A result that failed has the score 0. Without inputs the mean is None. Raises `ToolFailed` as soon as the metric
    fails, `LMFailed` or `LMNotConfigured` if an LM refuses the key, as it would for all.
    """
    # It imports asyncio, for which no ping waits.
    from dspy_bridge.commands import batch
    from dspy_bridge.programs.scores import mean

    metric, examples = await program.metric(given.metric, inputs, given.expected, call)

    async def score(index: int, outputs: dict[str, Any]) -> dict[str, Any]:
        value, feedback = await metric.score(examples[index], outputs, call)
        return {"score": value} if feedback is None else {"score": value, "feedback": feedback}

    results = await batch.run(
        inputs,
        work,
        call,
        stream=stream,
        max_concurrency=max_concurrency,
        item_timeout_ms=item_timeout_ms,
        score=score,
    )
    failed = sum(not result["success"] for result in results)
    scores = [result["score"] for result in results]
    return {"score": mean(scores) if scores else None, "failed": failed, "results": results}
