"""Evaluates a program: a batch whose results have scores. What is wrong is refused before an LM is asked."""

from __future__ import annotations

from dspy_bridge.commands import batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from dspy_bridge.dispatch.call import Call
    from dspy_bridge.programs.program import Program


async def run(
    args: dict[str, Any], program: Program, work: Callable[[Any], Coroutine[Any, Any, Any]], call: Call
) -> dict[str, Any]:
    """`{"score", "failed", "results"}`: those of a batch, each with its score, and the mean of all scores.

    A result that failed has the score 0. Without inputs the mean is None. Raises `ToolFailed` as soon as the metric
    fails, `LMFailed` or `LMNotConfigured` if an LM refuses the key, as it would for all.
    """
    # It imports what no ping waits for.
    from statistics import fmean

    metric, examples = await program.metric(args["metric"], args["inputs"], args.get("expected"))

    async def score(index: int, outputs: dict[str, Any]) -> dict[str, Any]:
        value, feedback = await metric.score(examples[index], outputs, call)
        return {"score": value} if feedback is None else {"score": value, "feedback": feedback}

    results = await batch.run(args, work, call, score)
    failed = sum(not result["success"] for result in results)
    scores = [result["score"] for result in results]
    return {"score": fmean(scores) if scores else None, "failed": failed, "results": results}
