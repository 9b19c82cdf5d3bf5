"""Undocumented names inside DSPy that are gone: programs are optimized without them, or it is said what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optimizing_host import EVERY, JUDGE, SMALL, Desk
from peer import ROOT

from dspy_bridge.lm import dspy_internals

NAMES = [name for name in dspy_internals.names if not name.lazy and name.there]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[dspy_internals.Name], str], Desk]]:
    """Starts peers without these names."""
    (tmp_path / "sitecustomize.py").write_text("import take_away")
    desks: list[Desk] = []

    def start(taken: list[dspy_internals.Name], how: str) -> Desk:
        env = {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fakes'}:{tmp_path}",
            "TAKEN": " ".join(f"{name.module}:{name.path}" for name in taken),
            "HOW": how,
        }
        desks.append(Desk(env=env))
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
