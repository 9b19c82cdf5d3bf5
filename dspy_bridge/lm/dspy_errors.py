"""Errors that come out of DSPy to those of the protocol, by their type or by the functions that they passed."""

from __future__ import annotations

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
from dspy_bridge.lm import dspy_internals, lm_call
from dspy_bridge.lm.adapters import json_repair_limit
from dspy_bridge.lm.transport import connecting


def translate(error: Exception, settings: list[str]) -> Exception:
    """The error of ours for one that a run raised, or `error` itself.

    `settings`: arguments of ours that became settings of DSPy's, which it may have refused.
    """
    known = _by_type(error)
    if known is not None:
        return known
    frames = _frames(error)
    unfit = InvalidArgs(f"inputs: DSPy cannot write them into a prompt: {error}")
    if any(function == "format" and module.startswith("dspy.adapters") for module, function in frames):
        return unfit
    parsing = any(function == "parse" and module.startswith(_ADAPTERS) for module, function in frames)
    if parsing and (
        isinstance(error, RecursionError) or any(_package(module) in _JSON_READERS for module, _ in frames)
    ):
        return OutputInvalid(
            f"the LM's answer could not be read: {type(error).__name__}, as of what is nested too deeply"
        )
    if settings and _is_of_settings(error, frames):
        return InvalidArgs(f"{' or '.join(settings)}: {error}")
    # From the prompt to a provider's request, settings of the LM included.
    if dspy_internals.CANONICAL.there and dspy_internals.CANONICAL.frame in frames:
        return unfit
    return error


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
    if isinstance(error, json_repair_limit.TooMuchToRepair):
        return OutputInvalid(f"the LM's answer did not fit the signature: {error}")
    if isinstance(error, dspy.CodeInterpreterError):
        # Not an error of the code, which goes to the LM: the sandbox is missing, or did not start.
        why = str(error).strip().split("\n", 1)[0]
        return SetupFailed(f"the sandbox for code failed: {why}; DSPy's own needs Deno 2: pip install 'dspy[deno]'")
    if isinstance(error, connecting.LMUnreachable):
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


_ADAPTERS = ("dspy.adapters", "dspy_bridge.lm.adapters")
# DSPy's adapters read JSON with these, which raise errors of their own for what is nested too deeply.
_JSON_READERS = ("json", "json_repair")
# Where DSPy calls an LM with its settings as keyword arguments, and where it checks them.
_CALLS = dspy_internals.COMPLETE_LEGACY
_CHECKS = [dspy_internals.PREPROCESS, dspy_internals.PREPARE, dspy_internals.SELECT_ENGINE]


def _is_of_settings(error: Exception, frames: list[tuple[str, str]]) -> bool:
    """Whether DSPy refused settings of an LM, which it does with Python's own errors.

    Code of an LM or an adapter may raise the same types, with contents in the message: that is a defect.
    """
    module, function = frames[-1]
    if isinstance(error, TypeError):
        by_adapter = module.startswith("dspy.adapters") and function in ("acall", "__call__")
        if by_adapter or frames[-1] in [name.frame for name in _CALLS if name.there]:
            return True
    refused = isinstance(error, (AttributeError, TypeError, ValueError, OverflowError)) and _package(module) == "dspy"
    return refused and any(name.there and name.frame in frames for name in _CHECKS)


def _frames(error: Exception) -> list[tuple[str, str]]:
    """The module and function of each frame that the error passed, the one that raised it last."""
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        frames.append((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        traceback = traceback.tb_next
    return frames


def _package(module: str) -> str:
    return module.partition(".")[0]
