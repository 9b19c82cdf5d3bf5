"""Errors that come out of DSPy to those of the protocol, by their type or by the functions that they passed."""

from __future__ import annotations

import traceback

import dspy

from dspy_bridge.errors import (
    BridgeError,
    InvalidArgs,
    LMFailed,
    LMNotConfigured,
    OutputInvalid,
    Overloaded,
    SetupFailed,
)
from dspy_bridge.lm import lm_call
from dspy_bridge.lm.adapters import json_answers
from dspy_bridge.lm.transport import outgoing


def translate(error: Exception, settings: list[str]) -> Exception:
    """The error of ours for one that a run raised, or `error` itself.

    `settings`: arguments of ours that became settings of DSPy's, which it may have refused.
    """
    known = _by_type(error)
    if known is not None:
        return known
    frames = [
        (str(frame.f_globals.get("__name__")), frame.f_code.co_name)
        for frame, _line in traceback.walk_tb(error.__traceback__)
    ]
    unfit = InvalidArgs(f"inputs: DSPy cannot write them into a prompt: {error}")
    if any(function == "format" and module.startswith("dspy.adapters") for module, function in frames):
        return unfit
    parsing = any(function == "parse" and module.startswith(_ADAPTERS) for module, function in frames)
    if parsing and (isinstance(error, RecursionError) or any(module.startswith(_JSON_READERS) for module, _ in frames)):
        return OutputInvalid(
            f"the LM's answer could not be read: {type(error).__name__}, as of what is nested too deeply"
        )
    if isinstance(error, ValueError) and any(module == "dspy.adapters.types.tool" for module, _ in frames):
        return OutputInvalid("the LM's answer did not fit the signature: its tool calls could not be read")
    module, function = frames[-1]
    # Code of an LM or an adapter may raise the same types, with contents in the message: that is a defect. Errors of an
    # LM's engine are errors of the LM: DSPy makes them so.
    making = any(passed.startswith(_CALLS) for passed, _ in frames)
    making = making or (module.startswith("dspy.adapters") and function in ("acall", "__call__"))
    if making and module.startswith("dspy.") and isinstance(error, _REFUSALS):
        return InvalidArgs(f"{' or '.join(settings)}: {error}") if settings else unfit
    return error


_ADAPTERS = ("dspy.adapters", "dspy_bridge.lm.adapters")
# DSPy's adapters read JSON with these, which raise errors of their own for what is nested too deeply.
_JSON_READERS = ("json.", "json_repair")
# Where DSPy reads a predictor's settings, and makes the request.
_CALLS = ("dspy.predict.predict", "dspy.clients")
# What Python's own errors are that DSPy refuses an LM's settings, or a prompt, with.
_REFUSALS = (AttributeError, TypeError, ValueError, OverflowError)


def _by_type(error: Exception) -> BridgeError | None:
    if isinstance(error, BridgeError):
        return error
    if isinstance(error, dspy.AdapterParseError):
        wanted = list(error.signature.output_fields)
        got = list(error.parsed_result or ())
        problem = "a value did not fit its type"
        if missing := [name for name in wanted if name not in got]:
            problem = f"{', '.join(missing)} could not be read"
        began = " ".join(str(error.lm_response).split())[:200]
        text = f"the LM's answer did not fit the signature: {problem}; expected {', '.join(wanted)}; it began {began!r}"
        return OutputInvalid(text)
    if isinstance(error, json_answers.TooMuchToRepair):
        return OutputInvalid(f"the LM's answer did not fit the signature: {error}")
    if isinstance(error, dspy.CodeInterpreterError):
        # Not an error of the code, which goes to the LM: the sandbox is missing, or did not start.
        why = str(error).strip().split("\n", 1)[0]
        return SetupFailed(f"the sandbox for code failed: {why}; DSPy's own needs Deno 2: pip install 'dspy[deno]'")
    if isinstance(error, outgoing.LMUnreachable):
        # For DSPy it is not: it would try again for seconds.
        return LMFailed(f"{type(error).__name__}: {error}", True)
    if isinstance(error, lm_call.LMOverloaded):
        return Overloaded(str(error), begun=error.begun)
    if isinstance(error, dspy.LMConfigurationError):
        return LMNotConfigured(str(error))
    if isinstance(error, dspy.LMError):
        refused = isinstance(error, (dspy.LMAuthError, dspy.LMBillingError))
        return LMFailed(f"{type(error).__name__}: {error}", dspy.is_retryable_lm_error(error), refused=refused)
    return None
