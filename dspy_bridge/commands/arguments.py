"""The arguments of the commands, as tables: by name, what fits and what an error says was expected. Imports no DSPy."""

from __future__ import annotations

from dspy_bridge.errors import InvalidArgs, refuse_unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Table = dict[str, tuple[Callable[[Any], bool], str]]


def _or_null(*types: type) -> Callable[[Any], bool]:
    return lambda value: value is None or type(value) in types


def _count(most: float = float("inf")) -> Callable[[Any], bool]:
    return lambda value: value is None or (type(value) is int and 1 <= value <= most)


# Each attempt is at least one more LM call.
_MOST_ATTEMPTS = 10
# Checked where the program is loaded.
_ANY = (lambda _value: True, "")
_TEXT = (lambda value: type(value) is str and value != "", "expected text")
_OBJECT = (_or_null(dict), "expected an object")
_MILLISECONDS = (
    lambda value: value is None or (type(value) in (int, float) and value > 0),
    "expected a number of milliseconds greater than 0",
)
_IDS = (
    lambda value: value is None or (type(value) is list and all(type(id) is str for id in value)),
    "expected a list of strings",
)
_FLAG = (lambda value: type(value) is bool, "expected true or false")
_LIMITS = {"lm_calls": (int,), "tokens": (int,), "usd": (int, float)}
_BUDGET = (
    lambda value: (
        value is None
        or (
            type(value) is dict
            and all(type(limit) in _LIMITS.get(name, ()) and limit > 0 for name, limit in value.items())
        )
    ),
    "expected an object of lm_calls and tokens, whole numbers of at least 1, and usd, a number greater than 0",
)
_LM = (_or_null(str, dict), 'expected text such as "openai/gpt-4o-mini", or an object with model')
_INPUTS = (
    lambda value: type(value) in (dict, list),
    "expected an object of the signature's input fields, or a list of such objects",
)

# All that is checked of a lazy program before it is loaded.
LAZY: Table = {
    "id": _TEXT,
    "signature": (lambda value: value is not None, "missing; expected text or an object with inputs and outputs"),
    "lazy": _FLAG,
}
CREATE: Table = {
    **LAZY,
    "lm": _LM,
    "config": _OBJECT,
    **dict.fromkeys(("program_type", "adapter", "options", "tools", "demos", "state", "state_path"), _ANY),
}
EXECUTE: Table = {
    "program_id": _TEXT,
    "inputs": _INPUTS,
    "config": _OBJECT,
    "lm": _LM,
    "attempts": (_count(_MOST_ATTEMPTS), f"expected a whole number from 1 to {_MOST_ATTEMPTS}"),
    "max_concurrency": (_count(), "expected a whole number of at least 1"),
    "item_timeout_ms": _MILLISECONDS,
    "expected": (_or_null(list), "expected a list of objects, one for each of the inputs"),
    "metric": (_or_null(dict), "expected an object with tool, or with field and match"),
    "budget": _BUDGET,
    "optimize": _ANY,
    # DSPex's adapter sends it, and no bridge has ever read it.
    "options": _ANY,
}
LIST: Table = {"details": _FLAG, "state": _FLAG, "program_ids": _IDS}
CLEANUP: Table = {"program_ids": _IDS}

_REQUIRED = ("id", "signature", "program_id", "inputs")
# Of an execute.
_FOR_LISTS = ("max_concurrency", "item_timeout_ms", "metric", "expected")
_NOT_WITH_OPTIMIZE = ("config", "attempts", "max_concurrency", "item_timeout_ms", "budget")


def check(args: dict[str, Any], table: Table) -> None:
    """Raises `InvalidArgs` for the first argument that does not fit."""
    for name, (fits, expected) in table.items():
        if (name in args or name in _REQUIRED) and not fits(args.get(name)):
            raise InvalidArgs(f"{name}: {expected}")


def check_create(args: dict[str, Any]) -> None:
    """All of a `create_program` that can be checked without DSPy. Raises `InvalidArgs`."""
    refuse_unknown(args, CREATE)
    check(args, CREATE)


def check_execute(args: dict[str, Any]) -> None:
    """The arguments of an `execute_program`, and how they go together. Raises `InvalidArgs`."""
    refuse_unknown(args, EXECUTE)
    check(args, EXECUTE)

    def given(*names: str) -> list[str]:
        return [name for name in names if args.get(name) is not None]

    inputs = args["inputs"]
    if type(inputs) is dict and (wrong := given(*_FOR_LISTS)):
        raise InvalidArgs(f"{wrong[0]}: only for a list of inputs")
    if given("expected"):
        if not given("metric"):
            raise InvalidArgs("expected: only with a metric, which compares with it")
        if len(args["expected"]) != len(inputs):
            counts = f"expected {len(inputs)} objects, one for each of the inputs, got {len(args['expected'])}"
            raise InvalidArgs(f"expected: {counts}")
    if given("optimize"):
        if not given("metric"):
            raise InvalidArgs("optimize: only with a list of inputs and a metric")
        if wrong := given(*_NOT_WITH_OPTIMIZE):
            instead = {"budget": "optimize has its own"}.get(wrong[0], "give config with the program")
            raise InvalidArgs(f"{wrong[0]}: not with optimize; {instead}")
