"""The errors of a request: one class per `error_type` of the protocol.

The text is one line: what is wrong and what was expected, with the name of the field.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


class BridgeError(Exception):
    """An error that the client gets with its text. Any other exception is a defect: `internal`."""

    error_type = "internal"
    # Clients match on the text, so a reply has it unchanged.
    exact = False
    # Whether the same request may be sent again later; None where the protocol does not have it (most).
    retryable: bool | None = None


# The longest name that is not cut, and the characters that would break the line or control a terminal.
_MOST_NAMED = 4096
_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
# No known name is longer; the comparison with them takes the square of the length.
_MOST_MISSPELT = 60
# Above `delete_program`, which is no `execute_program`.
_NEAR = 0.85


def _named(name: str) -> str:
    """A name as the client sent it; control characters are escaped, and a very long one is cut."""
    name = name if len(name) <= _MOST_NAMED else f"{name[: _MOST_NAMED - 1]}…"
    return name.translate(_CONTROLS)


def short(text: str) -> str:
    """A string as an error quotes it."""
    return repr(text if len(text) <= 60 else text[:59] + "…")


def step(name: str | int) -> str:
    """A step of a path in an error: `.x`, `['a b']` or `[0]`."""
    if isinstance(name, int):
        return f"[{name}]"
    return f".{name}" if name.removeprefix("$").isidentifier() and len(name) <= 60 else f"[{short(name)}]"


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The name in `known` that a misspelt one probably means, if one is near."""
    if len(given) > _MOST_MISSPELT:
        return None
    import difflib

    return next(iter(difflib.get_close_matches(given, list(known), 1, _NEAR)), None)


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Raises `InvalidArgs` for a name that is not in `known`. `where`: the object that has it; an argument if empty."""
    for name in given:
        if name not in known:
            text = f"{where}: unknown key {short(name)}" if where else f"{name}: unknown argument"
            near = nearest(name, known)
            meant = f"did you mean {near}? " if near else ""
            raise InvalidArgs(f"{text}; {meant}expected {', '.join(known) or 'none'}")


class InvalidArgs(BridgeError):
    error_type = "invalid_args"


class UnknownCommand(BridgeError):
    error_type = "unknown_command"
    exact = True

    def __init__(self, name: str) -> None:
        super().__init__(f"Unknown command: {_named(name)}")


class FrameTooLarge(BridgeError):
    error_type = "frame_too_large"


class ProgramNotFound(BridgeError):
    error_type = "program_not_found"
    exact = True

    def __init__(self, id: str) -> None:
        super().__init__(f"Program not found: {_named(id)}")


class LoadFailed(BridgeError):
    """A lazy program could not be loaded. `failure`: the error of the load as a reply has it."""

    def __init__(self, id: str, failure: dict[str, Any]) -> None:
        super().__init__(f"program {_named(id)} could not be loaded: {failure['error']}")
        self.error_type = failure["error_type"]
        self.retryable = failure.get("retryable")


class LMNotConfigured(BridgeError):
    """There is no LM, or it lacks a key or an address."""

    error_type = "lm_not_configured"


class LMFailed(BridgeError):
    """The LM failed, or the connection to it. `refused`: the key or the account was, as it is for any other prompt."""

    error_type = "lm_error"

    def __init__(self, text: str, retryable: bool, *, refused: bool = False) -> None:
        super().__init__(text)
        self.retryable = retryable
        self.refused = refused


def hits_all(error: BaseException | None) -> bool:
    """Whether the LM's server would refuse all other calls, too."""
    return isinstance(error, LMNotConfigured) or (isinstance(error, LMFailed) and error.refused)


class OutputInvalid(BridgeError):
    """The LM's answer does not fit. `field`: an output that was read, or None. `by_lm`: whether another may fit."""

    error_type = "output_invalid"

    def __init__(self, text: str, field: str | None = None, *, by_lm: bool = True) -> None:
        super().__init__(text)
        self.field = field
        self.by_lm = by_lm


class ToolFailed(BridgeError):
    """A tool of the client failed, or its result cannot be used."""

    error_type = "tool_error"


class TimedOut(BridgeError):
    error_type = "timeout"


class Cancelled(BridgeError):
    error_type = "cancelled"


class Overloaded(BridgeError):
    """As many runs are in flight and queued as the settings allow, or a run cannot ask its LM before its deadline.

    `begun`: some of the run was done: LMs or tools were asked. Then `retryable` is False: only the client can know
    whether that may be done twice.
    """

    error_type = "overloaded"

    def __init__(self, text: str, *, begun: bool = False) -> None:
        super().__init__(text)
        if begun:
            self.retryable = False


class BudgetSpent(BridgeError):
    """The budget has no LM calls, tokens or money left; `which` of these."""

    error_type = "budget_spent"
    retryable = False

    def __init__(self, text: str, which: str) -> None:
        super().__init__(text)
        self.which = which


class JournalMismatch(BridgeError):
    """A run asks its LM something else than the one whose journal it was given."""

    error_type = "journal_mismatch"
    retryable = False


class NotAllowed(BridgeError):
    error_type = "not_allowed"


class SetupFailed(BridgeError):
    """DSPy or the user's start-up code could not be loaded, so this peer has no programs."""
