"""Undocumented names inside DSPy that are gone: programs are optimized without them, or it is said what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optimizing_host import EVERY, JUDGE, SMALL, Desk
from taken_names import NAMES, without

from dspy_bridge.lm import dspy_internals


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[dspy_internals.Name], str], Desk]]:
    """Starts peers without these names."""
    desks: list[Desk] = []

    def start(taken: list[dspy_internals.Name], how: str) -> Desk:
        desks.append(Desk(env=without(taken, how, tmp_path)))
        return desks[-1]

    yield start
    for desk in desks:
        desk.__exit__()


@pytest.mark.parametrize("how", ["gone", "called"] if EVERY else ["gone"])
def test_without_any_name_all_optimizers_work(start: Callable[..., Desk], how: str) -> None:
    """`called`: functions are there, and take other arguments. A budget of calls holds, one of tokens is refused."""
    desk = start(NAMES if how == "gone" else [name for name in NAMES if name.takes], how)
    desk.create()
    for optimizer in SMALL:
        reply = desk.run(optimizer, JUDGE)
        assert reply["success"], (optimizer, reply)
        desk.create("better", state=reply["result"]["state"])
    desk.serve()
    reply = desk.run("random_search", budget={"lm_calls": 20})
    assert reply["result"]["stopped"] == "lm_calls"
    desk.nothing_follows(20)
    reply = desk.run("random_search", budget={"tokens": 20})
    if how == "gone":
        assert reply["error_type"] == "invalid_args" and reply["error"].startswith("optimize.budget.tokens: DSPy ")
    else:
        assert reply["result"]["stopped"] == "tokens"
