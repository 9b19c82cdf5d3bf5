"""Asks an LM small questions, to find out what it can do: for `mix dspex.doctor --ask`. Imports DSPy.

Neither question mentions JSON: an answer of the schema's form, or a function call, shows that the server honours it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

import dspy
import pydantic

from dspy_bridge.lm import dspy_setup, lm_options

# For each question; a small model on a busy machine takes long to read even these.
SECONDS = 60
_GREETING = "Say hello."
_WEATHER = "What is the weather in Paris now? Call the function."
_FUNCTION = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Returns the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# Errors that say nothing about what the LM can do.
_NO_ANSWER = (dspy.LMAuthError, dspy.LMBillingError, dspy.LMRateLimitError, dspy.LMTimeoutError, dspy.LMTransportError)


class Mood(pydantic.BaseModel):
    """What no greeting looks like."""

    model_config = pydantic.ConfigDict(extra="forbid")

    mood: Literal["calm", "busy"]
    certain: bool


def ask(model: str, of_dspy: dict[str, Any], supports: frozenset[str] | None) -> dict[str, Any]:
    """What the LM with these options of `dspy.LM` does.

    `ms`: of its first answer; `response_schema`, `function_calling`: whether it honours them; `supports`: the option
    that says so, None if it is already known. Or `error` and `kind`, the error's class.
    """
    lm = dspy_setup.make_lm({"model": model, **of_dspy, "cache": False, "num_retries": 0})
    found: dict[str, Any] = {}
    try:
        schema = _call(lm, found, _GREETING, response_format=Mood)
        if schema is None:
            _call(lm, found, _GREETING, must=True)
        functions = _call(lm, found, _WEATHER, tools=[_FUNCTION])
    except dspy.LMError as error:
        return {"kind": type(error).__name__, "error": str(error).strip().partition("\n")[0]}
    found["response_schema"] = _fits(schema)
    found["function_calling"] = isinstance(functions, dict) and bool(functions.get("tool_calls"))
    known = supports
    if known is None:
        known = frozenset(name for name in lm_options.CAPABILITIES if getattr(lm, f"supports_{name}"))
    # That one is not asked about.
    honoured = {name for name in lm_options.CAPABILITIES if found.get(name)} | known & {"reasoning"}
    wanted = [name for name in lm_options.CAPABILITIES if name in honoured] or ["none"]
    return {**found, "supports": None if honoured == known else wanted}


def _call(lm: Any, found: dict[str, Any], question: str, *, must: bool = False, **options: Any) -> Any:
    """The answer; None if the LM refuses these options. Raises `dspy.LMError`."""
    begun = time.monotonic()

    async def ask() -> Any:
        try:
            return (await asyncio.wait_for(lm.acall(question, **options), SECONDS))[0]
        except asyncio.TimeoutError:
            raise dspy.LMTimeoutError(f"no answer within {SECONDS} s") from None
        finally:
            await lm.aclose()

    try:
        answer = asyncio.run(ask())
    except dspy.LMError as error:
        if must or isinstance(error, _NO_ANSWER):
            raise
        return None
    found.setdefault("ms", round((time.monotonic() - begun) * 1000))
    return answer


def _fits(answer: Any) -> bool:
    text = answer.get("text") if isinstance(answer, dict) else answer
    try:
        return Mood.model_validate_json(text or "") is not None
    except ValueError:
        return False
