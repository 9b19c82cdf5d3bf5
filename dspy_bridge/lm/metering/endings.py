"""How each LM call ended: recorded for `meta`, and refused if the answer was cut off at `max_tokens`. Imports DSPy.

DSPy writes each answer into a history, in the context of the call: with the finish reason, the tokens and the cost,
which neither callbacks nor outputs have.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NoReturn

import dspy

from dspy_bridge.errors import InvalidArgs, OutputInvalid
from dspy_bridge.lm import lm_call
from dspy_bridge.lm.transport import outgoing

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


def _ended(lm: Any, entry: dict[str, Any]) -> None:
    """An LM has answered, or the cache. Raises `CutOff`."""
    call, run, usage, outputs = lm_call.current.get(), lm_call.run(), entry["usage"] or {}, entry["outputs"]
    reasons = _reasons_of(entry["response"])
    run.spend(_count(usage))
    if call is not None:
        if call.target is not None:
            outgoing.spend(call.target, _count(usage))
        call.usage = usage
        # Only then: a run may have thousands of long answers.
        call.outputs = None if call.entry is None else list(outputs)
        call.finish_reason = "length" if "length" in reasons else next(iter(reasons), None)
        free, cost = call.cached or getattr(lm, "costs_nothing", False), entry["cost"]
        call.cost = 0.0 if free else float(cost) if isinstance(cost, (int, float)) else None
    if "length" in reasons and run.refuses_cut_off:
        whole = [output for output, reason in zip(outputs, reasons, strict=False) if reason != "length"]
        if not whole or not keeping_whole.get():
            _refuse({**lm.kwargs, **entry["kwargs"]}, getattr(entry.get("request"), "config", None))
        outputs[:] = whole


# DSPy calls it for each answer, unless history is off; it would keep 10,000 prompts.
dspy.BaseLM.update_history = _ended


def _count(usage: dict[str, Any]) -> int:
    total = usage.get("total_tokens")
    names = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")
    counts = [total] if isinstance(total, int) else [usage.get(name) for name in names]
    return sum(count for count in counts if isinstance(count, int))


# Names of one thing: OpenAI's.
_SAME = {
    "tool_call": "tool_calls",
    "function_call": "tool_calls",
    "max_tokens": "length",
    "max_output_tokens": "length",
}


def _reasons_of(given: Any) -> list[str | None]:
    """Why the LM stopped, for each answer of one call. `given`: DSPy's answers, or a provider's as LiteLLM has it."""
    try:
        if choices := _get(given, "choices"):
            return [_named(_get(choice, "finish_reason")) for choice in choices]
        return [_reason(answer) for answer in (given if isinstance(given, tuple) else (given,))]
    except Exception:  # an LM of the user's may answer anything
        return [None]


def _reason(answer: Any) -> str | None:
    reason = _get(answer, "finish_reason")
    if reason not in (None, "tool_call"):
        return _named(reason)
    # For DSPy an answer with a tool call has ended with it, also where the provider cut it off. OpenAI's Responses API
    # has no finish reasons.
    raw = answer if reason is None else answer.provider_data
    choices = _get(raw, "choices") or [None]
    details = _get(_get(raw, "incomplete_details"), "reason")
    of_provider = _named(_get(choices[0], "finish_reason") or _get(raw, "stop_reason") or details)
    if reason is not None:
        return "length" if of_provider == "length" else _named(reason)
    called = any(_get(item, "type") == "function_call" for item in _get(raw, "output") or ())
    return ("tool_calls" if called else "stop") if _get(raw, "status") == "completed" else of_provider


def _named(reason: Any) -> str | None:
    return _SAME.get(reason, reason) if isinstance(reason, str) else None


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


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
