"""optimizing.optimizers.check: what an optimizer cannot run with is refused by name before anything runs."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from plain_optimizers import ROLES

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.optimizing import optimizers, options
from dspy_bridge.optimizing.arguments import OPTIMIZERS, Given

# What each can run with when nothing else is said.
LEAST: dict[str, dict[str, Any]] = {"gepa": {"options": {"auto": "light"}, "lms": {"reflection_lm": "x"}}}
BY_HAND = {"auto": None, "num_candidates": 3, "num_trials": 4}
VALSET = ([{}] * 60, None)


def given(optimizer: str, options: dict[str, Any] | None = None, **more: Any) -> Given:
    least = LEAST.get(optimizer, {})
    return Given(optimizer, **{**least, **({} if options is None else {"options": options}), **more})


def refusal(of: Given, trainset_size: int = 40) -> str:
    with pytest.raises(InvalidArgs) as error:
        optimizers.check(of, trainset_size)
    return str(error.value)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_defaults_are_accepted(optimizer: str) -> None:
    optimizers.check(given(optimizer), 40)


GIVEN = [
    ("labeled_few_shot", {"k": 500, "sample": True}),
    ("bootstrap_few_shot", {"max_bootstrapped_demos": 0, "max_labeled_demos": 0, "metric_threshold": -1}),
    ("random_search", {"num_candidate_programs": 0, "stop_at_score": 1, "max_rounds": 1000}),
    ("copro", {"breadth": 2, "depth": 1, "init_temperature": 0}),
    ("copro", {"init_temperature": 1.4}),
    ("mipro_v2", {"auto": "heavy", "view_data_batch_size": 1, "data_aware_proposer": False}),
    ("mipro_v2", {"max_bootstrapped_demos": 0, "max_labeled_demos": 0, "fewshot_aware_proposer": True}),
    ("mipro_v2", {**BY_HAND, "minibatch_size": 32}),
    ("mipro_v2", {**BY_HAND, "minibatch": False, "minibatch_size": 100}),
    ("simba", {"bsize": 40, "max_demos": 0, "temperature_for_candidates": 0.01, "demo_input_field_maxlen": 10**6}),
    ("gepa", {"max_full_evals": 2, "component_selector": "all", "failure_score": -1, "perfect_score": 5}),
    ("gepa", {"max_metric_calls": 10**6, "add_format_failure_as_feedback": True, "skip_perfect_score": False}),
    ("gepa", {"auto": "heavy", "max_merge_invocations": 0}),
]


@pytest.mark.parametrize(("optimizer", "of"), GIVEN)
def test_these_are_accepted(optimizer: str, of: dict[str, Any]) -> None:
    optimizers.check(given(optimizer, of), 40)


EVERY = [(optimizer, name) for optimizer in OPTIMIZERS for name in options.OPTIONS[optimizer]]


@pytest.mark.parametrize(("optimizer", "name"), EVERY)
def test_an_option_of_another_type_or_out_of_bounds_is_refused_by_name(optimizer: str, name: str) -> None:
    # What stands for no LM calls has no upper bound.
    unbounded = name in ("minibatch_size", "demo_input_field_maxlen")
    for wrong in ("x", [], {}, -(10**400), float("nan"), *(() if unbounded else (10**400,))):
        assert refusal(given(optimizer, {name: wrong})).startswith(f"optimize.options.{name}: expected ")
    if name != "auto" or optimizer == "gepa":
        assert refusal(given(optimizer, {name: None})).startswith(f"optimize.options.{name}: expected ")
    accepted = [value for value in (True, 1) if _accepts(options.OPTIONS[optimizer][name], value)]
    # For Python true is 1.
    assert len(accepted) <= 1


def _accepts(check: options.Check, value: Any) -> bool:
    try:
        check(value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("optimizer", "name", "wrong", "expected"),
    [
        ("labeled_few_shot", "k", 0, "a whole number from 1 to 500"),
        ("labeled_few_shot", "k", 501, "a whole number from 1 to 500"),
        ("bootstrap_few_shot", "max_labeled_demos", 501, "a whole number from 0 to 500"),
        ("bootstrap_few_shot", "max_rounds", 0, "a whole number from 1 to 1000"),
        ("bootstrap_few_shot", "metric_threshold", 0, "a number other than 0, which DSPy takes for none"),
        ("random_search", "max_bootstrapped_demos", 0, "a whole number from 1 to 500"),
        ("random_search", "num_candidate_programs", 1001, "a whole number from 0 to 1000"),
        ("copro", "breadth", 1, "a whole number from 2 to 100"),
        ("copro", "depth", 0, "a whole number from 1 to 1000"),
        ("copro", "init_temperature", 2.1, "a number from 0 to 2"),
        ("mipro_v2", "auto", "lite", "one of light, medium, heavy, null"),
        ("mipro_v2", "minibatch", 1, "true or false"),
        ("mipro_v2", "minibatch_size", 0, "a whole number of at least 1"),
        ("simba", "bsize", 0, "a whole number of at least 1"),
        ("simba", "temperature_for_sampling", 0, "a number from 0.01 to 100"),
        ("gepa", "auto", "lite", "one of light, medium, heavy"),
        ("gepa", "max_metric_calls", 1_000_001, "a whole number from 1 to 1000000"),
        ("gepa", "candidate_selection_strategy", "best", "one of pareto, current_best"),
        ("gepa", "component_selector", "random", "one of round_robin, all"),
    ],
)
def test_the_bounds(optimizer: str, name: str, wrong: Any, expected: str) -> None:
    assert refusal(given(optimizer, {name: wrong})) == f"optimize.options.{name}: expected {expected}"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "name", ["metric", "teacher_settings", "num_threads", "seed", "log_dir", "track_stats", "max_errors", "valset"]
)
def test_what_belongs_to_the_run_or_writes_files_is_no_option(optimizer: str, name: str) -> None:
    text = refusal(given(optimizer, {name: 1}))
    assert text.startswith(f"optimize.options: unknown key '{name}'; expected {next(iter(options.OPTIONS[optimizer]))}")


def test_a_misspelt_option_is_refused_with_the_one_that_is_meant() -> None:
    text = refusal(given("copro", {"bredth": 3}))
    assert (
        text
        == "optimize.options: unknown key 'bredth'; did you mean breadth? expected breadth, depth, init_temperature"
    )


def test_an_option_that_the_installed_dspy_lacks_is_refused() -> None:
    with pytest.raises(InvalidArgs) as error:
        options.read("copro", {"depth": 1}, ["breadth"])
    assert str(error.value) == "optimize.options.depth: the installed DSPy has no such option of copro"


def test_a_score_to_stop_at_is_a_mean_here_and_a_percentage_in_dspy() -> None:
    """DSPy rounds the percentage that it compares with: a third of all is 33.33."""
    read = options.OPTIONS["random_search"]["stop_at_score"]
    assert [read(mean) for mean in (0, 0.5, 1 / 3, 1)] == [0, 50, 33.33, 100]


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
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == package else find(name, *of))
    text = f"optimize.optimizer: {optimizer} needs the Python package {package}; install it with {how}"
    assert refusal(given(optimizer)).startswith(text)
    for other in OPTIMIZERS:
        if other != optimizer:
            optimizers.check(given(other), 40)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("role", ["prompt_lm", "teacher_lm", "reflection_lm"])
def test_an_lm_that_an_optimizer_has_no_use_for_is_refused(optimizer: str, role: str) -> None:
    lms = {**LEAST.get(optimizer, {}).get("lms", {}), role: "x"}
    if role in ROLES[optimizer]:
        optimizers.check(given(optimizer, lms=lms), 40)
        return
    taken = f"it takes {', '.join(ROLES[optimizer])}" if ROLES[optimizer] else "it asks only the program's LM"
    assert refusal(given(optimizer, lms=lms)) == f"optimize.{role}: {optimizer} has no use for it; {taken}"


def test_gepa_needs_a_reflection_lm_and_one_budget_of_its_own() -> None:
    assert refusal(given("gepa", lms={})) == "optimize.reflection_lm: missing; gepa asks it for new instructions"
    one = "optimize.options: gepa expects exactly one of auto, max_full_evals, max_metric_calls"
    assert refusal(given("gepa", {})) == one
    assert refusal(given("gepa", {"auto": "light", "max_metric_calls": 5})) == one


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_seed_or_a_valset_is_refused_where_nothing_takes_it(optimizer: str) -> None:
    if optimizer in ("mipro_v2", "simba", "gepa"):
        optimizers.check(given(optimizer, seed=0), 40)
    else:
        assert refusal(given(optimizer, seed=0)) == f"optimize.seed: {optimizer} takes none"
    if optimizer in ("random_search", "mipro_v2", "gepa"):
        optimizers.check(given(optimizer, valset=VALSET), 40)
    else:
        scores = "scores on the inputs" if optimizer in ("copro", "simba") else "scores nothing"
        assert refusal(given(optimizer, valset=VALSET)) == f"optimize.valset: {optimizer} takes none, as it {scores}"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_empty_trainset_is_refused(optimizer: str) -> None:
    assert refusal(given(optimizer), 0) == "inputs: expected at least one example to optimize with"


def test_simba_needs_as_many_examples_as_a_batch_has() -> None:
    text = "optimize.options.bsize: expected at most 31, the number of examples; it is 32"
    assert refusal(given("simba"), 31) == text
    assert refusal(given("simba", {"bsize": 32}), 31) == text
    optimizers.check(given("simba"), 32)


@pytest.mark.parametrize(
    ("of", "valset_size", "trainset_size", "text"),
    [
        ({}, None, 1, "inputs: expected at least 2 examples, as mipro_v2 sets some aside where no valset is given"),
        ({"auto": None}, None, 40, "optimize.options.num_candidates: missing; with auto null, mipro_v2 expects it"),
        (
            {"auto": None, "num_candidates": 3},
            None,
            40,
            "optimize.options.num_trials: missing; with auto null, mipro_v2 expects it",
        ),
        ({"num_trials": 3}, None, 40, "optimize.options.num_trials: auto light chooses it; give it with auto null"),
        (
            {"auto": "heavy", "num_candidates": 3},
            None,
            40,
            "optimize.options.num_candidates: auto heavy chooses it; give it with auto null",
        ),
        ({"minibatch": False}, None, 40, "optimize.options.minibatch: auto light chooses it; give it with auto null"),
        (
            BY_HAND,
            34,
            40,
            "optimize.options.minibatch_size: expected at most 34, the size of the valset, "
            "or minibatch false; it is 35",
        ),
        (
            BY_HAND,
            None,
            40,
            "optimize.options.minibatch_size: expected at most 32, the size of the valset, "
            "or minibatch false; it is 35",
        ),
        (
            {"minibatch_size": 101},
            200,
            40,
            "optimize.options.minibatch_size: expected at most 100, the size of the valset; it is 101",
        ),
        (
            {"max_bootstrapped_demos": 0},
            None,
            40,
            "optimize.options.max_bootstrapped_demos: expected at least 1, or max_labeled_demos 0 too",
        ),
    ],
)
def test_mipro_v2_is_told_what_dspy_would_refuse(
    of: dict[str, Any], valset_size: int | None, trainset_size: int, text: str
) -> None:
    valset = None if valset_size is None else ([{}] * valset_size, None)
    assert refusal(given("mipro_v2", of, valset=valset), trainset_size) == text


@pytest.mark.parametrize(
    ("of", "valset_size", "trainset_size"),
    [
        ({}, None, 2),
        ({}, 1, 1),
        (BY_HAND, 35, 1),
        (BY_HAND, None, 44),
        # With so few, auto takes them all each time.
        ({"minibatch_size": 1000}, 50, 1),
        ({"minibatch_size": 100}, 200, 1),
    ],
)
def test_mipro_v2_runs_with_these(of: dict[str, Any], valset_size: int | None, trainset_size: int) -> None:
    valset = None if valset_size is None else ([{}] * valset_size, None)
    optimizers.check(given("mipro_v2", of, valset=valset), trainset_size)
