"""DSPy's optimizers: what each takes, building one, and running it. Imports DSPy."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import dspy

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.optimizing import options
from dspy_bridge.optimizing.arguments import Given
from dspy_bridge.programs.saved_state import MAX_DEMOS


class Metrics(Protocol):
    """What scores a prediction, as the optimizers call it."""

    def score(self, example: Any, prediction: Any, trace: Any = None) -> float | bool: ...

    def simba(self, example: Any, prediction: Any) -> Any: ...

    def gepa(self, gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any: ...


class _Optimizer(NamedTuple):
    """`metric`: which of `Metrics` it is given. `lms`: by role, DSPy's name for it. `needs`: a package.

    `demos`: the options that bound the demos of a predictor. `scored_on`: see the function of that name.
    """

    cls: Any
    metric: str | None = "score"
    lms: Mapping[str, str] = {}
    valset: bool = False
    seed: bool = False
    demos: tuple[str, ...] = ()
    scored_on: str | None = None
    needs: str | None = None


_PROMPT = {"prompt_lm": "prompt_model"}
_TEACHER = {"teacher_lm": "teacher_settings"}
_BOOTSTRAPPED = ("max_bootstrapped_demos", "max_labeled_demos")
_OPTIMIZERS = {
    "labeled_few_shot": _Optimizer(dspy.LabeledFewShot, metric=None, demos=("k",)),
    "bootstrap_few_shot": _Optimizer(dspy.BootstrapFewShot, lms=_TEACHER, demos=_BOOTSTRAPPED),
    "random_search": _Optimizer(
        dspy.BootstrapFewShotWithRandomSearch, lms=_TEACHER, valset=True, demos=_BOOTSTRAPPED, scored_on="valset"
    ),
    "copro": _Optimizer(dspy.COPRO, lms=_PROMPT, scored_on="trainset"),
    "mipro_v2": _Optimizer(
        dspy.MIPROv2, lms=_PROMPT | _TEACHER, valset=True, seed=True, demos=_BOOTSTRAPPED, needs="optuna"
    ),
    "simba": _Optimizer(
        dspy.SIMBA,
        metric="simba",
        lms=_PROMPT | _TEACHER,
        seed=True,
        demos=("max_demos",),
        scored_on="trainset",
        needs="numpy",
    ),
    "gepa": _Optimizer(
        dspy.GEPA,
        metric="gepa",
        lms={"reflection_lm": "reflection_lm"},
        valset=True,
        seed=True,
        scored_on="valset",
        needs="gepa",
    ),
}
# Those in the extra `optimizers`; DSPy brings gepa itself, where gepa supports the Python.
_IN_EXTRA = ("optuna", "numpy")
# MIPROv2's own: what `auto` makes of a valset, and what a trainset without one gives up of itself.
_AUTO_VALSET = {"light": 100, "medium": 300, "heavy": 1000}
_AUTO_MINIBATCH = 50


def check(given: Given, trainset_size: int) -> None:
    """Whether this optimizer can run with this. Raises `InvalidArgs`, naming the key or the missing package."""
    name = given.optimizer
    optimizer = _OPTIMIZERS[name]
    _check_package(name, optimizer.needs)
    for role in given.lms:
        if role not in optimizer.lms:
            expected = f"it takes {', '.join(optimizer.lms)}" if optimizer.lms else "it asks only the program's LM"
            raise InvalidArgs(f"optimize.{role}: {name} has no use for it; {expected}")
    if name == "gepa" and "reflection_lm" not in given.lms:
        raise InvalidArgs("optimize.reflection_lm: missing; gepa asks it for new instructions")
    if given.seed is not None and not optimizer.seed:
        raise InvalidArgs(f"optimize.seed: {name} takes none")
    if given.valset is not None and not optimizer.valset:
        scores = "scores on the inputs" if optimizer.scored_on else "scores nothing"
        raise InvalidArgs(f"optimize.valset: {name} takes none, as it {scores}")
    if trainset_size == 0:
        raise InvalidArgs("inputs: expected at least one example to optimize with")
    chosen = _chosen(given)
    if name == "simba":
        _check_simba(chosen, trainset_size)
    elif name == "mipro_v2":
        _check_mipro(chosen, trainset_size, len(given.valset[0]) if given.valset else None)
    elif name == "gepa":
        budgets = ("auto", "max_full_evals", "max_metric_calls")
        if sum(budget in given.options for budget in budgets) != 1:
            raise InvalidArgs(f"optimize.options: gepa expects exactly one of {', '.join(budgets)}")


def load(name: str) -> None:
    """Import the package that an optimizer needs. Blocks.

    Not as the optimizer runs: optuna keeps the traceback of an import that failed, and so all that led to it.
    """
    needs = _OPTIMIZERS[name].needs
    if needs is not None:
        with suppress(ImportError):  # of a broken one, which the optimizer reports
            importlib.import_module(needs)


def compile(
    given: Given,
    student: dspy.Module,
    trainset: list[dspy.Example],
    valset: list[dspy.Example] | None,
    metrics: Metrics,
    lms: Mapping[str, dspy.BaseLM],
) -> dspy.Module:
    """The student optimized, after `check`: a module of the same kind. Blocks; the LM is that of `dspy.context`.

    SIMBA writes into the teacher's LM. Raises `InvalidArgs` before the first LM call, and what DSPy raises afterwards.
    """
    optimizer = _OPTIMIZERS[given.optimizer]
    chosen = _chosen(given)
    _check_demos(optimizer, chosen, len(student.predictors()))
    of_constructor, of_compile = _parameters(optimizer.cls)
    ours: dict[str, Any] = {"num_threads": given.num_threads, "track_stats": False}
    if optimizer.metric is not None:
        ours["metric"] = getattr(metrics, optimizer.metric)
    for role, lm in lms.items():
        keyword = optimizer.lms[role]
        ours[keyword] = {"lm": lm} if keyword == "teacher_settings" else lm
    if given.seed is not None:
        ours["seed"] = given.seed
    # COPRO's threads. A seed of MIPROv2's `compile` may not be 0, so the constructor comes first.
    ours["eval_kwargs"] = {"num_threads": given.num_threads}
    if valset is not None:
        ours["valset"] = valset
    every = {**chosen.read, **ours}
    try:
        teleprompter = optimizer.cls(**{name: every[name] for name in every if name in of_constructor})
    except (TypeError, ValueError, AssertionError) as error:
        raise InvalidArgs(f"optimize.options: DSPy refuses them: {error}") from error
    rest = {name: every[name] for name in every if name in of_compile and name not in of_constructor}
    return teleprompter.compile(student, trainset=trainset, **rest)


def scored_on(given: Given, trainset_size: int, valset_size: int | None) -> int | None:
    """How many examples one whole evaluation has; None if there is none, or if DSPy takes a sample (MIPROv2)."""
    on = _OPTIMIZERS[given.optimizer].scored_on
    if on == "valset" and valset_size is not None:
        return valset_size
    return None if on is None else trainset_size


def own_role(given: Given) -> str:
    """The role of an LM that was not given, and that the optimizer's own code asks; empty if there is none."""
    return "prompt_lm" if "prompt_lm" in _OPTIMIZERS[given.optimizer].lms else ""


def highest_score(given: Given) -> float:
    """SIMBA takes exp(score / temperature), which overflows past 709; its sum over all candidates soon after."""
    if given.optimizer != "simba":
        return float("inf")
    chosen = _chosen(given)
    return 700 * float(min(chosen["temperature_for_sampling"], chosen["temperature_for_candidates"]))


class _Chosen:
    """The options as DSPy takes them, with its defaults for the rest."""

    def __init__(self, read: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.read = read
        self._defaults = defaults

    def __contains__(self, name: str) -> bool:
        return name in self.read

    def __getitem__(self, name: str) -> Any:
        return self.read.get(name, self._defaults.get(name))


def _parameters(cls: Any) -> tuple[Mapping[str, inspect.Parameter], Mapping[str, inspect.Parameter]]:
    """Those of the constructor and of `compile`."""
    return inspect.signature(cls).parameters, inspect.signature(cls.compile).parameters


def _chosen(given: Given) -> _Chosen:
    of_constructor, of_compile = _parameters(_OPTIMIZERS[given.optimizer].cls)
    installed = {**of_compile, **of_constructor}
    defaults = {name: parameter.default for name, parameter in installed.items()}
    return _Chosen(options.read(given.optimizer, given.options, installed), defaults)


def _check_package(name: str, needs: str | None) -> None:
    if needs is None or importlib.util.find_spec(needs) is not None:
        return
    if needs in _IN_EXTRA:
        how = "install it with `mix dspex.setup --with optimizers`, or pip install 'dspy-bridge[optimizers]'"
    else:
        how = f"install it with pip install {needs}, which this Python may be too new for"
    raise InvalidArgs(f"optimize.optimizer: {name} needs the Python package {needs}; {how}")


def _check_simba(chosen: _Chosen, trainset_size: int) -> None:
    if chosen["bsize"] > trainset_size:
        raise InvalidArgs(
            f"optimize.options.bsize: expected at most {trainset_size}, the number of examples; it is {chosen['bsize']}"
        )


def _check_mipro(chosen: _Chosen, trainset_size: int, valset_size: int | None) -> None:
    if valset_size is None:
        if trainset_size < 2:
            raise InvalidArgs(
                "inputs: expected at least 2 examples, as mipro_v2 sets some aside where no valset is given"
            )
        valset_size = min(1000, max(1, int(trainset_size * 0.8)))
    by_hand = ("num_candidates", "num_trials")
    auto = chosen["auto"]
    if auto is None:
        for option in by_hand:
            if option not in chosen:
                raise InvalidArgs(f"optimize.options.{option}: missing; with auto null, mipro_v2 expects it")
        minibatch = chosen["minibatch"]
    else:
        for option in (*by_hand, "minibatch"):
            if option in chosen:
                raise InvalidArgs(f"optimize.options.{option}: auto {auto} chooses it; give it with auto null")
        valset_size = min(valset_size, _AUTO_VALSET[auto])
        minibatch = valset_size > _AUTO_MINIBATCH
    if minibatch and chosen["minibatch_size"] > valset_size:
        how = ", or minibatch false" if auto is None else ""
        raise InvalidArgs(
            f"optimize.options.minibatch_size: expected at most {valset_size}, the size of the valset{how}; "
            f"it is {chosen['minibatch_size']}"
        )
    if chosen["max_bootstrapped_demos"] == 0 and chosen["max_labeled_demos"] > 0:
        raise InvalidArgs("optimize.options.max_bootstrapped_demos: expected at least 1, or max_labeled_demos 0 too")


def _check_demos(optimizer: _Optimizer, chosen: _Chosen, predictors: int) -> None:
    """Raises `InvalidArgs` if a state with so many demos could not be loaded."""
    for option in optimizer.demos:
        if chosen[option] * predictors > MAX_DEMOS:
            raise InvalidArgs(
                f"optimize.options.{option}: expected at most {MAX_DEMOS // predictors}: the program has {predictors} "
                f"predictors, and a state has at most {MAX_DEMOS} demos"
            )
