"""module_options: options of DSPy's module constructors are read, or refused by name. No DSPy."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.programs import module_options

REWARD = {"field": "answer", "equals": "yes"}
BEST = {"N": 3, "threshold": 1.0, "module": "predict"}


@pytest.mark.parametrize(
    ("program_type", "given", "chosen"),
    [
        ("predict", {}, {}),
        ("chain_of_thought", {}, {}),
        ("react", {}, {}),
        ("react", {"max_iters": 1}, {"max_iters": 1}),
        ("react", {"max_iters": 1000}, {"max_iters": 1000}),
        ("best_of_n", {}, BEST),
        ("best_of_n", {"n": 5, "reward": REWARD}, {**BEST, "N": 5, "reward": REWARD}),
        ("best_of_n", {"N": 5}, {**BEST, "N": 5}),
        ("refine", {"threshold": -0.5, "fail_count": 2}, {**BEST, "threshold": -0.5, "fail_count": 2}),
        ("refine", {"threshold": 2, "module": "react"}, {**BEST, "threshold": 2.0, "module": "react"}),
        ("multi_chain_comparison", {"m": 5, "temperature": 0}, {"M": 5, "temperature": 0.0}),
        ("multi_chain_comparison", {"M": 2}, {"M": 2}),
        (
            "rlm",
            {"max_iters": 1, "max_llm_calls": 2, "max_output_chars": 1_000_000, "sub_lm": {"model": "x"}},
            {"max_iters": 1, "max_llm_calls": 2, "max_output_chars": 1_000_000, "sub_lm": {"model": "x"}},
        ),
    ],
)
def test_they_become_keyword_arguments_of_dspys_constructors(
    program_type: str, given: dict[str, Any], chosen: dict[str, Any]
) -> None:
    assert module_options.read(program_type, given) == chosen


WHOLE = [
    ("react", "max_iters"),
    ("best_of_n", "n"),
    ("best_of_n", "fail_count"),
    ("refine", "N"),
    ("refine", "fail_count"),
    ("multi_chain_comparison", "m"),
    ("rlm", "max_iters"),
    ("rlm", "max_llm_calls"),
    ("rlm", "max_output_chars"),
]


@pytest.mark.parametrize(("program_type", "option"), WHOLE)
@pytest.mark.parametrize("value", [0, -1, 1.5, 1.0, True, "3", None, [], {}])
def test_a_count_is_a_whole_number_of_at_least_one(program_type: str, option: str, value: Any) -> None:
    with pytest.raises(InvalidArgs, match=rf"^options\.{option}: expected a whole number"):
        module_options.read(program_type, {option: value})


@pytest.mark.parametrize(("program_type", "option"), WHOLE)
def test_a_count_of_lm_calls_has_a_limit(program_type: str, option: str) -> None:
    if option != "max_output_chars":
        with pytest.raises(InvalidArgs, match=rf"^options\.{option}: expected a whole number from 1 to \d+$"):
            module_options.read(program_type, {option: 10**6})


@pytest.mark.parametrize(
    ("program_type", "option", "value", "wanted"),
    [
        ("best_of_n", "threshold", "1", "a number"),
        ("best_of_n", "threshold", True, "a number"),
        ("refine", "threshold", None, "a number"),
        ("refine", "threshold", 10**400, "a number"),
        ("refine", "threshold", float("inf"), "a number"),
        ("multi_chain_comparison", "temperature", "hot", "a number"),
        ("best_of_n", "reward", "score", "an object"),
        ("best_of_n", "reward", [], "an object"),
        ("best_of_n", "module", "rlm", "one of predict, chain_of_thought, react"),
        ("refine", "module", ["predict"], "one of predict, chain_of_thought, react"),
        ("refine", "module", {}, "one of predict, chain_of_thought, react"),
        ("rlm", "sub_lm", 5, "a model's name, or an object with model"),
    ],
)
def test_other_values_are_refused_with_what_was_expected(
    program_type: str, option: str, value: Any, wanted: str
) -> None:
    with pytest.raises(InvalidArgs, match=rf"^options\.{option}: expected {wanted}$"):
        module_options.read(program_type, {option: value})


@pytest.mark.parametrize(
    ("program_type", "expected"),
    [
        ("predict", "it takes none"),
        ("chain_of_thought", "it takes none"),
        ("react", "expected max_iters"),
        ("best_of_n", "expected n, threshold, fail_count, reward, module"),
        ("refine", "expected n, threshold, fail_count, reward, module"),
        ("multi_chain_comparison", "expected m, temperature"),
        ("rlm", "expected max_iters, max_llm_calls, max_output_chars, sub_lm"),
    ],
)
@pytest.mark.parametrize("option", ["max_iter", "x", "", "verbose", "interpreter_factory"])
def test_an_unknown_option_is_refused_with_the_known_ones(program_type: str, option: str, expected: str) -> None:
    with pytest.raises(InvalidArgs) as refused:
        module_options.read(program_type, {option: 1})
    assert str(refused.value) == f"options.{option}: {program_type} has no such option; {expected}"


@pytest.mark.parametrize("given", [{"n": 2, "N": 3}, {"N": 2, "n": 3}])
def test_an_option_in_both_cases_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgs, match=r"^options\.n: given twice, as n and as N$"):
        module_options.read("best_of_n", given)
