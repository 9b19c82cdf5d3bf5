"""DSPy's optimizers: the argument `optimize`, the options of each, building one, and running it. Imports DSPy."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import dspy
import pydantic
from pydantic import Field

from dspy_bridge.errors import InvalidArgs, refuse_unknown
from dspy_bridge.programs.saved_state import MAX_DEMOS
from dspy_bridge.signatures import validation

Optimizer = Literal["labeled_few_shot", "bootstrap_few_shot", "random_search", "copro", "mipro_v2", "simba", "gepa"]
# The LMs that an optimizer asks for itself, next to that of the program, and the keywords by which DSPy takes them.
LM_ROLES = {"prompt_lm": "prompt_model", "teacher_lm": "teacher_settings", "reflection_lm": "reflection_lm"}
# numpy's generators take no more.
MAX_SEED = 2**32 - 1


class Budget(pydantic.BaseModel, strict=True, extra="forbid"):
    """The limits of a run; None: none."""

    lm_calls: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0, le=10**9)


class Valset(pydantic.BaseModel, strict=True, extra="forbid"):
    """What candidates are scored on. `expected`: one object for each of the inputs."""

    inputs: list[Any] = Field(min_length=1)
    expected: list[Any] | None = None


class Optimize(pydantic.BaseModel, strict=True):
    """What is to be run. The LMs are not checked yet."""

    optimizer: Optimizer
    options: dict[str, Any] = {}
    valset: Valset | None = None
    num_threads: int = Field(default=8, ge=1, le=64)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    prompt_lm: Any = None
    teacher_lm: Any = None
    reflection_lm: Any = None
    budget: Budget = Budget()

    @property
    def lms(self) -> dict[str, Any]:
        given = {role: getattr(self, role) for role in LM_ROLES}
        return {role: lm for role, lm in given.items() if lm is not None}


_CLASSES: dict[str, Any] = {
    "labeled_few_shot": dspy.LabeledFewShot,
    "bootstrap_few_shot": dspy.BootstrapFewShot,
    "random_search": dspy.BootstrapFewShotWithRandomSearch,
    "copro": dspy.COPRO,
    "mipro_v2": dspy.MIPROv2,
    "simba": dspy.SIMBA,
    "gepa": dspy.GEPA,
}
_NEEDS = {"mipro_v2": "optuna", "simba": "numpy", "gepa": "gepa"}
_SCORED_ON = {"random_search": "valset", "copro": "trainset", "simba": "trainset", "gepa": "valset"}

# DSPy makes lists of that length.
_COUNT = Annotated[int, Field(ge=0, le=1_000_000)]
_DEMOS = Annotated[int, Field(ge=0, le=MAX_DEMOS)]
_NUMBER = Annotated[float, Field(allow_inf_nan=False)]
# An optimizer takes those that its class or its `compile` has as parameters. Parameters that are Python objects, write
# files, or belong to the run (metric, LMs, threads, seed, statistics) are not options.
_OPTIONS: dict[str, Any] = {
    "auto": Literal["light", "medium", "heavy"] | None,
    **dict.fromkeys(("k", "max_bootstrapped_demos", "max_demos", "max_labeled_demos"), _DEMOS),
    **dict.fromkeys(("breadth", "bsize", "demo_input_field_maxlen", "depth", "max_full_evals"), _COUNT),
    **dict.fromkeys(("max_merge_invocations", "max_metric_calls", "max_rounds", "max_steps"), _COUNT),
    **dict.fromkeys(("minibatch_full_eval_steps", "minibatch_size", "num_candidate_programs"), _COUNT),
    **dict.fromkeys(("num_candidates", "num_trials", "reflection_minibatch_size", "view_data_batch_size"), _COUNT),
    **dict.fromkeys(("failure_score", "init_temperature", "metric_threshold", "perfect_score"), _NUMBER),
    **dict.fromkeys(("stop_at_score", "temperature_for_candidates", "temperature_for_sampling"), _NUMBER),
    **dict.fromkeys(("add_format_failure_as_feedback", "labeled_sample", "minibatch", "sample"), bool),
    **dict.fromkeys(("skip_perfect_score", "use_merge"), bool),
    **{f"{kind}_aware_proposer": bool for kind in ("program", "data", "tip", "fewshot")},
    "candidate_selection_strategy": Literal["pareto", "current_best"],
    "component_selector": Literal["round_robin", "all"],
}


def options(name: str) -> dict[str, Any]:
    """The types of an optimizer's options."""
    return {option: _OPTIONS[option] for option in _takes(name) if option in _OPTIONS}


def read(value: object, trainset_size: int) -> Optimize:
    """The argument `optimize`, which can be run. A key that is null counts as absent. Blocks: it imports packages.

    Raises `InvalidArgs`, naming the key or the missing package.
    """
    if not isinstance(value, dict):
        raise InvalidArgs("optimize: expected an object with optimizer")
    refuse_unknown(value, Optimize.model_fields, "optimize")
    try:
        given = Optimize.model_validate({key: of_key for key, of_key in value.items() if of_key is not None})
    except pydantic.ValidationError as error:
        raise validation.describe("optimize", error) from None
    name, valset = given.optimizer, given.valset
    if valset is not None and valset.expected is not None and len(valset.expected) != len(valset.inputs):
        counts = f"{len(valset.inputs)} objects, one for each of the inputs, got {len(valset.expected)}"
        raise InvalidArgs(f"optimize.valset.expected: expected {counts}")
    try:
        # Not as it runs: optuna keeps the traceback of an import that failed, and so all that led to it.
        importlib.import_module(_NEEDS.get(name, "dspy"))
    except ImportError as error:
        how = "`mix dspex.setup --with optimizers`, or pip install 'dspy-bridge[optimizers]'"
        if name == "gepa":  # DSPy brings it, where it supports the Python
            how = "pip install gepa, which this Python may be too new for"
        text = f"optimize.optimizer: {name} needs the Python package {_NEEDS[name]}; install it with {how}"
        raise InvalidArgs(text) from error
    takes = _takes(name)
    for role in given.lms:
        if LM_ROLES[role] not in takes:
            raise InvalidArgs(f"optimize.{role}: {name} has no use for it")
    for key in ("seed", "valset"):
        if getattr(given, key) is not None and key not in takes:
            raise InvalidArgs(f"optimize.{key}: {name} takes none")
    given.options = validation.read_options(given.options, options(name), "optimize.options")
    if trainset_size == 0:
        raise InvalidArgs("inputs: expected at least one example to optimize with")
    return given


def _takes(name: str) -> dict[str, inspect.Parameter]:
    """The parameters of `compile` and of the constructor."""
    cls = _CLASSES[name]
    return {**inspect.signature(cls.compile).parameters, **inspect.signature(cls).parameters}


def compile(
    given: Optimize,
    student: dspy.Module,
    trainset: list[dspy.Example],
    valset: list[dspy.Example] | None,
    metric: Any,
    lms: Mapping[str, dspy.BaseLM],
) -> dspy.Module:
    """The student optimized: a module of the same kind. Blocks; the LM is that of `dspy.context`."""
    cls = _CLASSES[given.optimizer]
    of_constructor, takes = inspect.signature(cls).parameters, _takes(given.optimizer)
    every: dict[str, Any] = {
        **given.options,
        "num_threads": given.num_threads,
        # COPRO's threads.
        "eval_kwargs": {"num_threads": given.num_threads},
        "track_stats": False,
        "metric": metric,
        **{LM_ROLES[role]: {"lm": lm} if role == "teacher_lm" else lm for role, lm in lms.items()},
    }
    if "stop_at_score" in every:
        # DSPy compares it with a mean that it has rounded so, in percent.
        every["stop_at_score"] = round(100 * every["stop_at_score"], 2)
    if given.seed is not None:
        every["seed"] = given.seed
    if valset is not None:
        every["valset"] = valset
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
    return "prompt_lm" if LM_ROLES["prompt_lm"] in _takes(given.optimizer) else ""
