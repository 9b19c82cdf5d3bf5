"""Programs as plain DSPy runs them, for the comparison with what a peer sends.

A script. Its arguments: the address of an LM, its key, and programs with inputs as JSON, as the commands take them.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")

import dspy

ADAPTERS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter, "xml": dspy.XMLAdapter}


def search(query: str, limit: int) -> dict[str, Any]:
    """Looks something up."""
    return {"found": [query, "text of a document"], "limit": limit}


def reward(_inputs: Any, outputs: Any) -> float:
    return float(outputs.answer == "Paris")


def made(program: dict[str, Any]) -> dspy.Module:
    signature, kind = program["signature"], program.get("program_type", "predict")
    if kind == "react":
        return dspy.ReAct(signature, tools=[search], max_iters=program["options"]["max_iters"])
    if kind == "chain_of_thought":
        return dspy.ChainOfThought(signature)
    if kind == "best_of_n":
        return dspy.BestOfN(dspy.Predict(signature), N=program["options"]["n"], reward_fn=reward, threshold=1.0)
    module = dspy.Predict(signature)
    module.demos = [dspy.Example(**demo) for demo in program.get("demos", [])]
    return module


def value(given: Any) -> Any:
    """An input: media and histories are objects."""
    if isinstance(given, dict) and set(given) == {"messages"}:
        return dspy.History(**given)
    if isinstance(given, str) and given.startswith("data:image/"):
        return dspy.Image(given)
    return given


def main(url: str, key: str, programs: str) -> None:
    lm = dspy.LM("openai/stub", api_base=url, api_key=key, cache=False, num_retries=0)
    for program, inputs in json.loads(programs):
        with dspy.context(lm=lm, adapter=ADAPTERS[program["adapter"]]()):
            made(program)(**{name: value(given) for name, given in inputs.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
