"""`options` of a program: the settings of DSPy's module constructors, checked. Pure; imports no DSPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.programs import option_checks

# Each run is at least one LM call; more than this is a mistake.
MAX_RUNS = 1000
# Each adds a field, and DSPy's time is quadratic: 0.1 s for 100, 18 s for 1000, while other creates wait.
MAX_COMPARED = 100
# The modules that best_of_n and refine may run several times.
INNER_MODULES = ("predict", "chain_of_thought", "react")


def _count(most: int = MAX_RUNS) -> Callable[[Any], Any]:
    return option_checks.whole(1, most)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


def _lm(value: Any) -> Any:
    if not isinstance(value, (str, dict)):
        raise ValueError("expected a model's name, or an object with model")
    return value


def _inner(value: Any) -> str:
    if value not in INNER_MODULES:
        raise ValueError(f"expected one of {', '.join(INNER_MODULES)}")
    return str(value)


# By program type: the option's name here and in DSPy's constructor, and its check.
_BEST = {
    "n": ("N", _count()),
    "threshold": ("threshold", option_checks.number),
    "fail_count": ("fail_count", _count()),
    "reward": ("reward", _object),
    "module": ("module", _inner),
}
_OPTIONS: dict[str, dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "predict": {},
    "chain_of_thought": {},
    "react": {"max_iters": ("max_iters", _count())},
    "best_of_n": _BEST,
    "refine": _BEST,
    "multi_chain_comparison": {"m": ("M", _count(MAX_COMPARED)), "temperature": ("temperature", option_checks.number)},
    "rlm": {
        "max_iters": ("max_iters", _count()),
        "max_llm_calls": ("max_llm_calls", _count()),
        "max_output_chars": ("max_output_chars", option_checks.size),
        "sub_lm": ("sub_lm", _lm),
    },
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    # DSPy has no defaults for these.
    "best_of_n": {"N": 3, "threshold": 1.0, "module": "predict"},
    "refine": {"N": 3, "threshold": 1.0, "module": "predict"},
}


def read(program_type: str, given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of DSPy's constructor. Raises `InvalidArgs`, naming the option."""
    known = _OPTIONS[program_type]
    chosen = dict(_DEFAULTS.get(program_type, {}))
    for name, value in given.items():
        # DSPy's own spelling is N and M.
        option = known.get(name.lower() if len(name) == 1 else name)
        if option is None:
            expected = f"expected {', '.join(known)}" if known else "it takes none"
            raise InvalidArgs(f"options.{name}: {program_type} has no such option; {expected}")
        keyword, check = option
        if name != keyword and keyword in given:
            raise InvalidArgs(f"options.{name}: given twice, as {name} and as {keyword}")
        try:
            chosen[keyword] = check(value)
        except ValueError as error:
            raise InvalidArgs(f"options.{name}: {error}") from None
    return chosen
