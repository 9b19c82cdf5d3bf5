"""DSPy's optimizers: the options that may be chosen of each, building one, and running it. Imports DSPy.

What DSPy refuses itself is `invalid_args` in `optimization`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import dspy
import pydantic

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.optimizing.arguments import Optimize
from dspy_bridge.programs.saved_state import MAX_DEMOS
from dspy_bridge.signatures import validation_errors

_CLASSES: dict[str, Any] = {
    "labeled_few_shot": dspy.LabeledFewShot,
    "bootstrap_few_shot": dspy.BootstrapFewShot,
    "random_search": dspy.BootstrapFewShotWithRandomSearch,
    "copro": dspy.COPRO,
    "mipro_v2": dspy.MIPROv2,
    "simba": dspy.SIMBA,
    "gepa": dspy.GEPA,
}
# The keyword by which DSPy's constructors take the LM of a role.
_KEYWORDS = {"prompt_lm": "prompt_model", "teacher_lm": "teacher_settings", "reflection_lm": "reflection_lm"}
_NEEDS = {"mipro_v2": "optuna", "simba": "numpy", "gepa": "gepa"}
_SCORED_ON = {"random_search": "valset", "copro": "trainset", "simba": "trainset", "gepa": "valset"}

# DSPy makes lists of that length.
_COUNT = Annotated[int, pydantic.Field(ge=0, le=1_000_000)]
_DEMOS = Annotated[int, pydantic.Field(ge=0, le=MAX_DEMOS)]
_NUMBER = Annotated[float, pydantic.Field(allow_inf_nan=False)]
_AUTO = Literal["light", "medium", "heavy"]
_BOOTSTRAP = {
    "max_bootstrapped_demos": _DEMOS,
    "max_labeled_demos": _DEMOS,
    "max_rounds": _COUNT,
    "metric_threshold": _NUMBER,
}
# Not among them: what is a Python object, writes files, or belongs to the run (metric, LMs, threads, seed, statistics).
OPTIONS: dict[str, dict[str, Any]] = {
    "labeled_few_shot": {"k": _DEMOS, "sample": bool},
    "bootstrap_few_shot": _BOOTSTRAP,
    "random_search": {**_BOOTSTRAP, "num_candidate_programs": _COUNT, "stop_at_score": _NUMBER, "labeled_sample": bool},
    "copro": {"breadth": _COUNT, "depth": _COUNT, "init_temperature": _NUMBER},
    "mipro_v2": {
        "auto": _AUTO | None,
        **dict.fromkeys(("max_bootstrapped_demos", "max_labeled_demos"), _DEMOS),
        **dict.fromkeys(("metric_threshold", "init_temperature"), _NUMBER),
        **dict.fromkeys(("num_candidates", "num_trials", "minibatch_size", "view_data_batch_size"), _COUNT),
        "minibatch_full_eval_steps": _COUNT,
        "minibatch": bool,
        **{f"{kind}_aware_proposer": bool for kind in ("program", "data", "tip", "fewshot")},
    },
    "simba": {
        **dict.fromkeys(("bsize", "num_candidates", "max_steps", "demo_input_field_maxlen"), _COUNT),
        "max_demos": _DEMOS,
        **dict.fromkeys(("temperature_for_sampling", "temperature_for_candidates"), _NUMBER),
    },
    "gepa": {
        "auto": _AUTO,
        **dict.fromkeys(("max_full_evals", "max_metric_calls", "reflection_minibatch_size"), _COUNT),
        "candidate_selection_strategy": Literal["pareto", "current_best"],
        "component_selector": Literal["round_robin", "all"],
        **dict.fromkeys(("skip_perfect_score", "add_format_failure_as_feedback", "use_merge"), bool),
        "max_merge_invocations": _COUNT,
        **dict.fromkeys(("failure_score", "perfect_score"), _NUMBER),
    },
}


def check(given: Optimize, trainset_size: int) -> None:
    """Whether this optimizer can run with this. Blocks. Raises `InvalidArgs`, naming the key or the missing package."""
    name = given.optimizer
    _check_package(name)
    takes = _takes(name)
    for role in given.lms:
        if _KEYWORDS[role] not in takes:
            raise InvalidArgs(f"optimize.{role}: {name} has no use for it")
    for key, value in (("seed", given.seed), ("valset", given.valset)):
        if value is not None and key not in takes:
            raise InvalidArgs(f"optimize.{key}: {name} takes none")
    for option in _options(given):
        if option not in takes:
            raise InvalidArgs(f"optimize.options.{option}: the installed DSPy has no such option of {name}")
    if trainset_size == 0:
        raise InvalidArgs("inputs: expected at least one example to optimize with")


def compile(
    given: Optimize,
    student: dspy.Module,
    trainset: list[dspy.Example],
    valset: list[dspy.Example] | None,
    metrics: Any,
    lms: Mapping[str, dspy.BaseLM],
) -> dspy.Module:
    """The student optimized, after `check`: a module of the same kind. Blocks; the LM is that of `dspy.context`.

    `metrics`: has the metric as `score`, `simba` and `gepa`. Raises what DSPy raises.
    """
    cls = _CLASSES[given.optimizer]
    of_constructor, takes = inspect.signature(cls).parameters, _takes(given.optimizer)
    chosen = _options(given)
    if "stop_at_score" in chosen:
        # DSPy compares it with a mean that it has rounded so, in percent.
        chosen["stop_at_score"] = round(100 * chosen["stop_at_score"], 2)
    ours: dict[str, Any] = {
        "num_threads": given.num_threads,
        # COPRO's threads.
        "eval_kwargs": {"num_threads": given.num_threads},
        "track_stats": False,
        "metric": getattr(metrics, given.optimizer, metrics.score),
    }
    for role, lm in lms.items():
        ours[_KEYWORDS[role]] = {"lm": lm} if role == "teacher_lm" else lm
    if given.seed is not None:
        ours["seed"] = given.seed
    if valset is not None:
        ours["valset"] = valset
    every = {**chosen, **ours}
    # A seed of MIPROv2's `compile` may not be 0, so the constructor comes first.
    teleprompter = cls(**{name: every[name] for name in every if name in of_constructor})
    rest = {name: every[name] for name in every if name in takes and name not in of_constructor}
    return teleprompter.compile(student, trainset=trainset, **rest)


def scored_on(given: Optimize, trainset_size: int) -> int | None:
    """How many examples one whole evaluation has; None if there is none, or if DSPy takes a sample (MIPROv2)."""
    on = _SCORED_ON.get(given.optimizer)
    if on == "valset" and given.valset is not None:
        return len(given.valset.inputs)
    return None if on is None else trainset_size


def own_role(given: Optimize) -> str:
    """The role of an LM that was not given, and that the optimizer's own code asks; empty if there is none."""
    return "prompt_lm" if _KEYWORDS["prompt_lm"] in _takes(given.optimizer) else ""


def _takes(name: str) -> dict[str, inspect.Parameter]:
    """The parameters of `compile` and of the constructor."""
    cls = _CLASSES[name]
    return {**inspect.signature(cls.compile).parameters, **inspect.signature(cls).parameters}


def _options(given: Optimize) -> dict[str, Any]:
    return validation_errors.read_options(given.options, OPTIONS[given.optimizer], "optimize.options")


def _check_package(name: str) -> None:
    """Import the package that the optimizer needs.

    Not as it runs: optuna keeps the traceback of an import that failed, and so all that led to it.
    """
    needs = _NEEDS.get(name)
    try:
        if needs is not None:
            importlib.import_module(needs)
    except ImportError as error:
        # DSPy brings gepa itself, where gepa supports the Python.
        how = f"pip install {needs}, which this Python may be too new for"
        if needs != "gepa":
            how = "`mix dspex.setup --with optimizers`, or pip install 'dspy-bridge[optimizers]'"
        text = f"optimize.optimizer: {name} needs the Python package {needs}; install it with {how}"
        raise InvalidArgs(text) from error
