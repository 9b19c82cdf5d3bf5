"""How each LM call ended: recorded for `meta`, and refused if the answer was cut off at `max_tokens`. Imports DSPy.

DSPy finishes every LM call with one function, in the context of the call. A wrapper around it reads what DSPy has found
out (finish reason, cost, whether the cache answered), which neither callbacks nor outputs have.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any, NoReturn

import dspy

from dspy_bridge.errors import InvalidArgs, OutputInvalid
from dspy_bridge.lm import dspy_internals, lm_call
from dspy_bridge.lm.lm_call import LMCall

# In the `config` of a program or a call; ours, so DSPy does not get it.
ALLOW_TRUNCATED = "allow_truncated"


class CutOff(OutputInvalid, dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """An answer was cut off. An error of the LM for DSPy, whose adapters ask again after other ones."""


# Whether the other answers to such a call are kept: to calls that an optimizer makes itself, which ask for many.
keeping_whole: ContextVar[bool] = ContextVar("keeping_whole", default=False)


def take_allowed(config: dict[str, Any] | None) -> tuple[dict[str, Any], bool | None]:
    """A `config` without `allow_truncated`, and its value, None if it has none. Raises `InvalidArgs`."""
    if not config or ALLOW_TRUNCATED not in config:
        return config or {}, None
    config = dict(config)
    allowed = config.pop(ALLOW_TRUNCATED)
    if not isinstance(allowed, bool):
        raise InvalidArgs(f"config.{ALLOW_TRUNCATED}: expected true or false")
    return config, allowed


def install() -> None:
    """Watch all LM calls of this process."""
    dspy_internals.FINALIZE.wrap(_watch)


def _watch(finalize: Any) -> Any:
    @functools.wraps(finalize)
    def watched(lm: Any, call: Any, result: Any) -> Any:
        made = finalize(lm, call, result)
        # With `_get`: a later DSPy may know less of a call, which must not fail for that.
        reasons = _reasons_of(_get(result, "responses"), _get(result, "raw"))
        record = lm_call.current.get()
        if record is not None:
            _note(record, lm, reasons, result)
        if "length" in reasons and lm_call.run().refuses_cut_off:
            return _whole(made, reasons) or _refuse(_get(call, "legacy"), _get(_get(call, "request"), "config"))
        return made

    return watched


def _note(record: LMCall, lm: Any, reasons: list[str | None], result: Any) -> None:
    if record.entry is not None:
        # Only then: a run may have thousands of long answers.
        record.outputs = _get(result, "outputs")
    record.finish_reason = "length" if "length" in reasons else next(iter(reasons), None)
    record.cached = _get(result, "cache_hit")
    cost = _get(result, "cost")
    if record.cached or getattr(lm, "costs_nothing", False):
        record.cost = 0.0
    elif isinstance(cost, (int, float)):
        record.cost = float(cost)


# Names of one thing: OpenAI's.
_SAME = {
    "tool_call": "tool_calls",
    "function_call": "tool_calls",
    "max_tokens": "length",
    "max_output_tokens": "length",
}


def _reasons_of(responses: Any, raw: Any) -> list[str | None]:
    """Why the LM stopped, for each answer of one call. `raw`: a provider's reply as LiteLLM has it."""
    try:
        if responses:
            return [_reason(response.finish_reason, response) for response in responses]
        choices = _get(raw, "choices")
        if choices:
            return [_named(_get(choice, "finish_reason")) for choice in choices]
        return [_of_status(raw)]
    except Exception:  # an LM of the user's may answer anything
        return [None]


def _reason(reason: Any, response: Any) -> str | None:
    if reason == "tool_call":
        # For DSPy an answer with a tool call has ended with it, also where the provider cut it off.
        given = response.provider_data
        choices = _get(given, "choices") or [{}]
        for of_provider in (_get(choices[0], "finish_reason"), _get(given, "stop_reason"), _of_status(given)):
            if of_provider is not None and _named(of_provider) == "length":
                return "length"
    return _named(reason)


def _of_status(raw: Any) -> str | None:
    """Of OpenAI's Responses API, which has no finish reasons."""
    status = _get(raw, "status")
    if status == "incomplete":
        return _named(_get(_get(raw, "incomplete_details"), "reason"))
    called = any(_get(item, "type") == "function_call" for item in _get(raw, "output") or ())
    return ("tool_calls" if called else "stop") if status == "completed" else None


def _named(reason: Any) -> str | None:
    return _SAME.get(reason, reason) if isinstance(reason, str) else None


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _whole(outputs: Any, reasons: list[str | None]) -> list[Any]:
    """Of several answers to one call, those that were not cut off, if these are wanted."""
    if not keeping_whole.get() or not isinstance(outputs, list) or len(outputs) != len(reasons):
        return []
    return [output for output, reason in zip(outputs, reasons, strict=True) if reason != "length"]


def _refuse(*settings: Any) -> NoReturn:
    """Raises `CutOff`. `settings`: where the limit may be; the first one that has it counts."""
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    limits = (_get(given, name) for given in settings for name in names)
    limit = next((limit for limit in limits if limit is not None), None)
    shown = f" ({limit})" if isinstance(limit, int) else ", of which none was set: at the limit of the LM"
    raise CutOff(
        f"the LM's answer was cut off at max_tokens{shown}; give it more, or take what there is with "
        f"config.{ALLOW_TRUNCATED}: true"
    )
