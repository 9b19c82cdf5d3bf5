"""optimizing.arguments: the argument `optimize` is read, or what is wrong with it is named. No DSPy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.optimizing import arguments
from dspy_bridge.optimizing.arguments import Budget, Given


def values(given: Given | Budget) -> dict[str, Any]:
    found = {name: getattr(given, name) for name in given.__slots__}
    return {name: values(value) if isinstance(value, Budget) else value for name, value in found.items()}


LEAST = {
    "optimizer": "copro",
    "options": {},
    "valset": None,
    "num_threads": 8,
    "seed": None,
    "lms": {},
    "budget": {"lm_calls": None, "tokens": None, "seconds": None},
}


@pytest.mark.parametrize(
    ("value", "more"),
    [
        ({}, {}),
        (dict.fromkeys(("options", "valset", "num_threads", "seed", "prompt_lm", "budget")), {}),
        ({"options": {"depth": 1}}, {"options": {"depth": 1}}),
        ({"valset": {"inputs": [{"q": 1}]}}, {"valset": ([{"q": 1}], None)}),
        ({"valset": {"inputs": [{"q": 1}], "expected": [{"a": 2}]}}, {"valset": ([{"q": 1}], [{"a": 2}])}),
        ({"num_threads": 1}, {"num_threads": 1}),
        ({"num_threads": 64}, {"num_threads": 64}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": 2**32 - 1}, {"seed": 2**32 - 1}),
        (
            {"prompt_lm": "a/b", "teacher_lm": {"model": "c/d"}, "reflection_lm": "e/f"},
            {"lms": {"prompt_lm": "a/b", "teacher_lm": {"model": "c/d"}, "reflection_lm": "e/f"}},
        ),
        ({"budget": {"lm_calls": 1}}, {"budget": {"lm_calls": 1, "tokens": None, "seconds": None}}),
        (
            {"budget": {"lm_calls": 10**20, "tokens": 2, "seconds": 3}},
            {"budget": {"lm_calls": 10**20, "tokens": 2, "seconds": 3.0}},
        ),
        ({"budget": {"seconds": 0.5, "tokens": None}}, {"budget": {"lm_calls": None, "tokens": None, "seconds": 0.5}}),
    ],
)
def test_it_is_read_with_defaults_and_null_is_absent(value: dict[str, Any], more: dict[str, Any]) -> None:
    assert values(arguments.read({"optimizer": "copro", **value})) == {**LEAST, **more}


@pytest.mark.parametrize("optimizer", arguments.OPTIMIZERS)
def test_there_are_seven_optimizers(optimizer: str) -> None:
    assert arguments.read({"optimizer": optimizer}).optimizer == optimizer
    assert len(arguments.OPTIMIZERS) == 7


NUMBERS = [True, False, "1", 1.5, [], {}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "optimize: expected an object with optimizer"),
        ([], "optimize: expected an object with optimizer"),
        ("copro", "optimize: expected an object with optimizer"),
        ({}, "optimize.optimizer: expected one of labeled_few_shot, "),
        ({"optimizer": 1}, "optimize.optimizer: expected one of labeled_few_shot, "),
        ({"optimizer": ["copro"]}, "optimize.optimizer: expected one of labeled_few_shot, "),
        ({"optimizer": "mipro_v1"}, "optimize.optimizer: unknown optimizer 'mipro_v1'; did you mean mipro_v2? "),
        ({"optimizer": "knn"}, "optimize.optimizer: unknown optimizer 'knn'; expected one of "),
        ({"optimiser": "copro"}, "optimize: unknown key 'optimiser'; did you mean optimizer? expected optimizer, "),
        ({"optimizer": "copro", "metric": {}}, "optimize: unknown key 'metric'; expected "),
        ({"optimizer": "copro", "options": []}, "optimize.options: expected an object"),
        ({"optimizer": "copro", "valset": []}, "optimize.valset: expected an object"),
        ({"optimizer": "copro", "valset": {"input": []}}, "optimize.valset: unknown key 'input'; did you mean inputs?"),
        ({"optimizer": "copro", "valset": {}}, "optimize.valset.inputs: expected a list of objects, at least one"),
        (
            {"optimizer": "copro", "valset": {"inputs": []}},
            "optimize.valset.inputs: expected a list of objects, at least one",
        ),
        ({"optimizer": "copro", "valset": {"inputs": {}}}, "optimize.valset.inputs: expected a list"),
        (
            {"optimizer": "copro", "valset": {"inputs": [{}], "expected": {}}},
            "optimize.valset.expected: expected a list",
        ),
        (
            {"optimizer": "copro", "valset": {"inputs": [{}], "expected": []}},
            "optimize.valset.expected: expected 1 objects, one for each of the inputs, got 0",
        ),
        *(
            ({"optimizer": "copro", "num_threads": wrong}, "optimize.num_threads: expected a whole number from 1 to 64")
            for wrong in (*NUMBERS, 0, 65, -1)
        ),
        *(
            ({"optimizer": "copro", "seed": wrong}, "optimize.seed: expected a whole number from 0 to 4294967295")
            for wrong in (*NUMBERS, -1, 2**32)
        ),
        *(
            ({"optimizer": "copro", role: 1}, f'optimize.{role}: expected text such as "openai/gpt-4o-mini", or ')
            for role in arguments.LM_ROLES
        ),
        ({"optimizer": "copro", "budget": 5}, "optimize.budget: expected an object"),
        ({"optimizer": "copro", "budget": {"calls": 5}}, "optimize.budget: unknown key 'calls'; expected lm_calls, "),
        *(
            ({"optimizer": "copro", "budget": {name: wrong}}, f"optimize.budget.{name}: expected a whole number of at")
            for name in ("lm_calls", "tokens")
            for wrong in (*NUMBERS, 0, -1)
        ),
        *(
            ({"optimizer": "copro", "budget": {"seconds": wrong}}, "optimize.budget.seconds: expected a number greater")
            for wrong in (True, "1", [], 0, -1, 10**400)
        ),
    ],
)
def test_what_is_wrong_is_named(value: object, text: str) -> None:
    with pytest.raises(InvalidArgs) as error:
        arguments.read(value)
    assert str(error.value).startswith(text)


def test_reading_it_imports_nothing_heavy() -> None:
    """It is read by the code that answers the first ping's peer; DSPy comes with the first program."""
    code = "import sys; import dspy_bridge.optimizing.arguments; print({'dspy', 'typing', 'json'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n", done.stdout
