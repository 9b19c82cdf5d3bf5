"""The argument `optimize` of an `execute_program`, checked as far as that goes without DSPy. Pure."""

from __future__ import annotations

import sys

from dspy_bridge.errors import InvalidArgs, nearest, refuse_unknown, short

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OPTIMIZERS = ("labeled_few_shot", "bootstrap_few_shot", "random_search", "copro", "mipro_v2", "simba", "gepa")
# The LMs that an optimizer asks for itself, next to that of the program.
LM_ROLES = ("prompt_lm", "teacher_lm", "reflection_lm")
MAX_THREADS = 64
# numpy's generators take no more.
MAX_SEED = 2**32 - 1

_KEYS = ("optimizer", "options", "valset", "num_threads", "seed", *LM_ROLES, "budget")


class Budget:
    """The limits of a run; None: none."""

    __slots__ = ("lm_calls", "seconds", "tokens")

    def __init__(self, lm_calls: int | None = None, tokens: int | None = None, seconds: float | None = None) -> None:
        self.lm_calls = lm_calls
        self.tokens = tokens
        self.seconds = seconds


class Given:
    """What is to be run. `valset`: its inputs, and what is expected of each, if anything.

    `options` are not checked yet; `lms` has those that were given of `LM_ROLES`, as `lm` of a request is given.
    """

    __slots__ = ("budget", "lms", "num_threads", "optimizer", "options", "seed", "valset")

    def __init__(
        self,
        optimizer: str,
        options: dict[str, Any] | None = None,
        *,
        valset: tuple[list[Any], list[Any] | None] | None = None,
        num_threads: int = 8,
        seed: int | None = None,
        lms: dict[str, str | dict[str, Any]] | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.options = options or {}
        self.valset = valset
        self.num_threads = num_threads
        self.seed = seed
        self.lms = lms or {}
        self.budget = budget or Budget()


def read(value: object) -> Given:
    """The argument `optimize`. A key that is null counts as absent. Raises `InvalidArgs`."""
    if not isinstance(value, dict):
        raise InvalidArgs("optimize: expected an object with optimizer")
    refuse_unknown(value, _KEYS, "optimize")
    given = {key: of_key for key, of_key in value.items() if of_key is not None}
    num_threads = given.get("num_threads", 8)
    if type(num_threads) is not int or not 1 <= num_threads <= MAX_THREADS:
        raise InvalidArgs(f"optimize.num_threads: expected a whole number from 1 to {MAX_THREADS}")
    seed = given.get("seed")
    if seed is not None and not (type(seed) is int and 0 <= seed <= MAX_SEED):
        raise InvalidArgs(f"optimize.seed: expected a whole number from 0 to {MAX_SEED}")
    return Given(
        _optimizer(given.get("optimizer")),
        _object(given.get("options", {}), "optimize.options"),
        valset=_valset(given.get("valset")),
        num_threads=num_threads,
        seed=seed,
        lms={role: _lm(given[role], role) for role in LM_ROLES if role in given},
        budget=_budget(given.get("budget", {})),
    )


def _optimizer(value: object) -> str:
    if isinstance(value, str) and value in OPTIMIZERS:
        return value
    expected = f"expected one of {', '.join(OPTIMIZERS)}"
    if isinstance(value, str):
        near = nearest(value, OPTIMIZERS)
        meant = f"did you mean {near}? " if near else ""
        raise InvalidArgs(f"optimize.optimizer: unknown optimizer {short(value)}; {meant}{expected}")
    raise InvalidArgs(f"optimize.optimizer: {expected}")


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgs(f"{where}: expected an object")
    return value


def _valset(value: object) -> tuple[list[Any], list[Any] | None] | None:
    if value is None:
        return None
    valset = _object(value, "optimize.valset")
    refuse_unknown(valset, ("inputs", "expected"), "optimize.valset")
    inputs, expected = valset.get("inputs"), valset.get("expected")
    if not isinstance(inputs, list) or not inputs:
        raise InvalidArgs("optimize.valset.inputs: expected a list of objects, at least one")
    if expected is not None and not isinstance(expected, list):
        raise InvalidArgs("optimize.valset.expected: expected a list of objects, one for each of the inputs")
    if expected is not None and len(expected) != len(inputs):
        raise InvalidArgs(
            f"optimize.valset.expected: expected {len(inputs)} objects, one for each of the inputs, got {len(expected)}"
        )
    return inputs, expected


def _lm(value: object, role: str) -> str | dict[str, Any]:
    if not isinstance(value, (str, dict)):
        raise InvalidArgs(f'optimize.{role}: expected text such as "openai/gpt-4o-mini", or an object with model')
    return value


def _budget(value: object) -> Budget:
    budget = _object(value, "optimize.budget")
    refuse_unknown(budget, ("lm_calls", "tokens", "seconds"), "optimize.budget")
    for name in ("lm_calls", "tokens"):
        most = budget.get(name)
        if most is not None and not (type(most) is int and most >= 1):
            raise InvalidArgs(f"optimize.budget.{name}: expected a whole number of at least 1")
    seconds = budget.get("seconds")
    if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds <= sys.float_info.max):
        raise InvalidArgs("optimize.budget.seconds: expected a number greater than 0")
    return Budget(budget.get("lm_calls"), budget.get("tokens"), None if seconds is None else float(seconds))
