"""`optimize.options`: which settings of each of DSPy's optimizers may be chosen, and how each is read. Imports DSPy.

Not among them: what is a Python object, writes files, or belongs to the run (metric, LMs, threads, seed, statistics).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from dspy_bridge.errors import InvalidArgs, refuse_unknown
from dspy_bridge.programs import option_checks
from dspy_bridge.programs.saved_state import MAX_DEMOS

# Each stands for LM calls, most for many; more than this is a mistake.
MAX_COUNT = 1000
MAX_METRIC_CALLS = 1_000_000
# COPRO asks for all of them in one call.
MAX_BREADTH = 100
# DSPy takes exp(score / temperature), which overflows with less.
MIN_SAMPLING_TEMPERATURE = 0.01

Check = Callable[[Any], Any]


def _whole(least: int = 1, most: int = MAX_COUNT) -> Check:
    return option_checks.whole(least, most)


def _temperature(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 2:
        raise ValueError("expected a number from 0 to 2")
    return float(value)


def _sampling(value: Any) -> float:
    if type(value) not in (int, float) or not MIN_SAMPLING_TEMPERATURE <= value <= 100:
        raise ValueError(f"expected a number from {MIN_SAMPLING_TEMPERATURE} to 100")
    return float(value)


def _threshold(value: Any) -> float:
    if option_checks.number(value) == 0:
        raise ValueError("expected a number other than 0, which DSPy takes for none")
    return float(value)


def _percent(value: Any) -> float:
    # DSPy compares it with a mean that it has rounded so.
    return round(100 * option_checks.number(value), 2)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _one_of(*names: str | None) -> Check:
    def read(value: Any) -> str | None:
        if not (value is None or isinstance(value, str)) or value not in names:
            raise ValueError(f"expected one of {', '.join('null' if name is None else name for name in names)}")
        return value

    return read


_DEMOS = _whole(0, MAX_DEMOS)
_BOOTSTRAP = {
    "max_bootstrapped_demos": _DEMOS,
    "max_labeled_demos": _DEMOS,
    "max_rounds": _whole(),
    "metric_threshold": _threshold,
}
_AUTO = ("light", "medium", "heavy")
OPTIONS: dict[str, dict[str, Check]] = {
    "labeled_few_shot": {"k": _whole(1, MAX_DEMOS), "sample": _flag},
    "bootstrap_few_shot": _BOOTSTRAP,
    "random_search": {
        **_BOOTSTRAP,
        # DSPy draws a number from 1 to it.
        "max_bootstrapped_demos": _whole(1, MAX_DEMOS),
        # Next to three that are always tried.
        "num_candidate_programs": _whole(0),
        # DSPy's is in percent.
        "stop_at_score": _percent,
        "labeled_sample": _flag,
    },
    "copro": {"breadth": _whole(2, MAX_BREADTH), "depth": _whole(), "init_temperature": _temperature},
    "mipro_v2": {
        "auto": _one_of(*_AUTO, None),
        "num_candidates": _whole(),
        "num_trials": _whole(),
        "max_bootstrapped_demos": _DEMOS,
        "max_labeled_demos": _DEMOS,
        "metric_threshold": _threshold,
        "init_temperature": _temperature,
        "minibatch": _flag,
        "minibatch_size": option_checks.size,
        "minibatch_full_eval_steps": _whole(),
        "view_data_batch_size": _whole(),
        "program_aware_proposer": _flag,
        "data_aware_proposer": _flag,
        "tip_aware_proposer": _flag,
        "fewshot_aware_proposer": _flag,
    },
    "simba": {
        "bsize": option_checks.size,
        "num_candidates": _whole(),
        "max_steps": _whole(),
        "max_demos": _DEMOS,
        "demo_input_field_maxlen": option_checks.size,
        "temperature_for_sampling": _sampling,
        "temperature_for_candidates": _sampling,
    },
    "gepa": {
        "auto": _one_of(*_AUTO),
        "max_full_evals": _whole(),
        "max_metric_calls": _whole(1, MAX_METRIC_CALLS),
        "reflection_minibatch_size": _whole(),
        "candidate_selection_strategy": _one_of("pareto", "current_best"),
        "component_selector": _one_of("round_robin", "all"),
        "skip_perfect_score": _flag,
        "add_format_failure_as_feedback": _flag,
        "use_merge": _flag,
        "max_merge_invocations": _whole(0),
        "failure_score": option_checks.number,
        "perfect_score": option_checks.number,
    },
}


def read(optimizer: str, given: dict[str, Any], installed: Collection[str]) -> dict[str, Any]:
    """The keyword arguments for DSPy's constructor and `compile`, of which the installed DSPy has `installed`.

    Raises `InvalidArgs`, naming the option.
    """
    known = OPTIONS[optimizer]
    refuse_unknown(given, known, "optimize.options")
    chosen = {}
    for name, value in given.items():
        if name not in installed:
            raise InvalidArgs(f"optimize.options.{name}: the installed DSPy has no such option of {optimizer}")
        try:
            chosen[name] = known[name](value)
        except ValueError as error:
            raise InvalidArgs(f"optimize.options.{name}: {error}") from None
    return chosen
