"""optimizing.arguments: the argument `optimize` is read, or what is wrong with it is named. No DSPy."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.optimizing import arguments


def test_all_but_the_optimizer_has_a_default_and_null_is_absent() -> None:
    nothing = dict.fromkeys(("options", "valset", "num_threads", "seed", "prompt_lm", "budget"))
    for optimizer in arguments.OPTIMIZERS:
        read = arguments.read({"optimizer": optimizer, **nothing})
        assert read == arguments.Optimize(optimizer=optimizer)
        assert (read.num_threads, read.options, read.lms) == (8, {}, {})
        assert read.budget.model_dump() == {"lm_calls": None, "tokens": None, "seconds": None}
    assert len(arguments.OPTIMIZERS) == 7


def test_what_is_given_is_read() -> None:
    read = arguments.read(
        {
            "optimizer": "mipro_v2",
            "options": {"auto": "light"},
            "valset": {"inputs": [{"q": 1}], "expected": [{"a": 2}]},
            "num_threads": 64,
            "seed": 2**32 - 1,
            "prompt_lm": "a/b",
            "teacher_lm": {"model": "c/d"},
            "budget": {"lm_calls": 10**20, "tokens": None, "seconds": 3},
        }
    )
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
        ({"optimizer": "copro", "valset": {"input": []}}, "optimize.valset: unknown key 'input'; did you mean inputs?"),
        ({"optimizer": "copro", "budget": {"calls": 5}}, "optimize.budget: unknown key 'calls'; expected lm_calls, "),
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
    with pytest.raises(InvalidArgs) as error:
        arguments.read(value)
    assert str(error.value).startswith(text)
