"""garbage: what is loaded is frozen; what was removed is collected first."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from dspy_bridge.runtime.gc_freeze import EVERY, GcFreezer


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


class Cycle:
    """Only a collection frees it."""

    alive = 0

    def __init__(self) -> None:
        self.me = self
        Cycle.alive += 1

    def __del__(self) -> None:
        Cycle.alive -= 1


def test_due_after_so_many_changes() -> None:
    garbage = GcFreezer()
    assert [garbage.loaded() for _ in range(EVERY)] == [False] * (EVERY - 1) + [True]
    assert not garbage.removed(EVERY - 1) and garbage.removed(1)
    garbage.settle()
    assert not garbage.loaded() and not garbage.removed(1)


def test_loaded_objects_are_frozen_without_a_collection() -> None:
    garbage = GcFreezer()
    gc.collect()
    Cycle()
    garbage.loaded()
    garbage.settle()
    assert gc.get_freeze_count() > 0 and Cycle.alive == 1
    gc.collect()
    assert Cycle.alive == 1, "what is frozen is not collected"


def test_removed_objects_are_collected_even_if_they_were_frozen() -> None:
    test_loaded_objects_are_frozen_without_a_collection()
    garbage = GcFreezer()
    garbage.removed(1)
    garbage.settle()
    assert Cycle.alive == 0 and gc.get_freeze_count() > 0
