"""optimizers: `optimize` is read; what an optimizer cannot run with is refused by name before anything runs."""

from __future__ import annotations

import inspect
import sys
from typing import Any, get_args

import pytest
from plain_optimizers import ROLES

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.optimizing import optimizers
from dspy_bridge.optimizing.optimizers import LM_ROLES, Optimizer


def given(optimizer: str, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "options": options or {}, **more}


def refusal(of: object, trainset_size: int = 40) -> str:
    with pytest.raises(InvalidArgs) as error:
        optimizers.read(of, trainset_size)
    return str(error.value)


def test_all_but_the_optimizer_has_a_default_and_null_is_absent() -> None:
    nothing = dict.fromkeys(("options", "valset", "num_threads", "seed", "prompt_lm", "budget"))
    for optimizer in get_args(Optimizer):
        read = optimizers.read({"optimizer": optimizer, **nothing}, 1)
        assert read == optimizers.Optimize(optimizer=optimizer)
        assert (read.num_threads, read.options, read.lms) == (8, {}, {})
        assert read.budget.model_dump() == {"lm_calls": None, "tokens": None, "seconds": None}


def test_what_is_given_is_read() -> None:
    value = {
        "optimizer": "mipro_v2",
        "options": {"auto": "light"},
        "valset": {"inputs": [{"q": 1}], "expected": [{"a": 2}]},
        "num_threads": 64,
        "seed": 2**32 - 1,
        "prompt_lm": "a/b",
        "teacher_lm": {"model": "c/d"},
        "budget": {"lm_calls": 10**20, "tokens": None, "seconds": 3},
    }
    read = optimizers.read(value, 1)
    assert read.options == {"auto": "light"} and read.valset is not None
    assert (read.valset.inputs, read.valset.expected) == ([{"q": 1}], [{"a": 2}])
    assert (read.num_threads, read.seed) == (64, 2**32 - 1)
    assert read.lms == {"prompt_lm": "a/b", "teacher_lm": {"model": "c/d"}}
    assert read.budget.model_dump() == {"lm_calls": 10**20, "tokens": None, "seconds": 3.0}


NUMBERS = [True, "1", 1.5, []]


def bad(where: str, *values: Any) -> list[tuple[dict[str, Any], str]]:
    """Each value is refused there."""
    _, key, *inner = where.split(".")
    return [({"optimizer": "copro", key: {inner[0]: value} if inner else value}, f"{where}: ") for value in values]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((value, "optimize: expected an object with optimizer") for value in (None, [], "copro")),
        ({}, "optimize.optimizer: "),
        *(({"optimizer": value}, "optimize.optimizer: Input should be 'labeled_") for value in (1, ["copro"], "knn")),
        ({"optimiser": "copro"}, "optimize: unknown key 'optimiser'; did you mean optimizer? expected optimizer, "),
        ({"optimizer": "copro", "metric": {}}, "optimize: unknown key 'metric'; expected "),
        ({"optimizer": "copro", "valset": {"input": []}}, "optimize.valset.inputs: Field required"),
        ({"optimizer": "copro", "budget": {"calls": 5}}, "optimize.budget.calls: Extra inputs are not permitted"),
        *bad("optimize.options", [], "x"),
        *bad("optimize.valset", [], 5),
        *bad("optimize.valset.inputs", [], {}, None),
        *bad("optimize.num_threads", *NUMBERS, 0, 65, -1),
        *bad("optimize.seed", *NUMBERS, -1, 2**32),
        *bad("optimize.budget", 5),
        *bad("optimize.budget.lm_calls", *NUMBERS, 0, -1),
        *bad("optimize.budget.tokens", *NUMBERS, 0, -1),
        *bad("optimize.budget.seconds", True, "1", [], 0, -1, 10**400),
        (
            {"optimizer": "copro", "valset": {"inputs": [{}], "expected": []}},
            "optimize.valset.expected: expected 1 objects, one for each of the inputs, got 0",
        ),
    ],
)
def test_what_is_wrong_is_named(value: object, text: str) -> None:
    assert refusal(value).startswith(text)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_dspys_own_defaults_are_values_of_the_options(optimizer: str) -> None:
    """So the types of the options are those that DSPy means."""
    cls = optimizers._CLASSES[optimizer]
    parameters = {**inspect.signature(cls.compile).parameters, **inspect.signature(cls).parameters}
    defaults = {name: parameters[name].default for name in optimizers.options(optimizer)}
    optimizers.read(given(optimizer, {name: value for name, value in defaults.items() if value is not None}), 40)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_an_option_of_another_type_is_refused_by_name(optimizer: str) -> None:
    for name in optimizers.options(optimizer):
        for wrong in ([], {}, float("nan"), 10**400):
            assert refusal(given(optimizer, {name: wrong})).startswith(f"optimize.options.{name}: Input should be ")


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_what_belongs_to_the_run_or_writes_files_is_no_option(optimizer: str) -> None:
    for name in ("metric", "teacher_settings", "num_threads", "seed", "log_dir", "track_stats", "max_errors", "valset"):
        assert refusal(given(optimizer, {name: 1})).startswith(f"optimize.options: unknown key '{name}'; expected ")


@pytest.mark.parametrize(
    ("optimizer", "package", "how"),
    [
        ("mipro_v2", "optuna", "`mix dspex.setup --with optimizers`, or pip install 'dspy-bridge[optimizers]'"),
        ("simba", "numpy", "`mix dspex.setup --with optimizers`, or pip install 'dspy-bridge[optimizers]'"),
        ("gepa", "gepa", "pip install gepa, "),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, package: str, how: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    text = f"optimize.optimizer: {optimizer} needs the Python package {package}; install it with {how}"
    assert refusal(given(optimizer)).startswith(text)
    optimizers.read(given("copro"), 40)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_what_an_optimizer_has_no_use_for_is_refused(optimizer: str) -> None:
    takes = {
        **{role: role in ROLES[optimizer] for role in LM_ROLES},
        "seed": optimizer in ("mipro_v2", "simba", "gepa"),
        "valset": optimizer in ("random_search", "mipro_v2", "gepa"),
    }
    for key, taken in takes.items():
        value: Any = {"seed": 0, "valset": {"inputs": [{}]}}.get(key, "a/b")
        if taken:
            optimizers.read(given(optimizer, **{key: value}), 40)
        else:
            assert refusal(given(optimizer, **{key: value})).startswith(f"optimize.{key}: {optimizer} ")


def test_an_empty_trainset_is_refused() -> None:
    assert refusal(given("copro"), 0) == "inputs: expected at least one example to optimize with"


@pytest.mark.parametrize(
    ("optimizer", "valset_size", "size"),
    [
        ("labeled_few_shot", None, None),
        ("bootstrap_few_shot", None, None),
        ("random_search", None, 20),
        ("random_search", 5, 5),
        ("copro", None, 20),
        ("mipro_v2", 5, None),
        ("mipro_v2", None, None),
        ("simba", None, 20),
        ("gepa", None, 20),
        ("gepa", 5, 5),
    ],
)
def test_the_size_of_a_whole_evaluation(optimizer: str, valset_size: int | None, size: int | None) -> None:
    more = {} if valset_size is None else {"valset": {"inputs": [{}] * valset_size}}
    assert optimizers.scored_on(optimizers.read(given(optimizer, **more), 20), 20) == size
