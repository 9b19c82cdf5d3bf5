"""gc_freeze: loaded programs are frozen; garbage, and removed ones, are collected first."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from dspy_bridge.runtime.gc_freeze import EVERY, GcFreezer, importing


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


def test_due_after_so_many_changes_and_garbage_is_not_kept() -> None:
    freezer = GcFreezer()
    assert [freezer.changed(1, removed=False) for _ in range(EVERY)] == [False] * (EVERY - 1) + [True]
    Cycle()
    freezer.freeze()
    assert gc.get_freeze_count() > 0 and Cycle.alive == 0
    assert not freezer.changed(EVERY - 1, removed=True) and freezer.changed(1, removed=True)


def test_removed_objects_are_collected_even_if_they_were_frozen() -> None:
    freezer = GcFreezer()
    program = Cycle()
    freezer.freeze()
    del program
    gc.collect()
    assert Cycle.alive == 1, "what is frozen is not collected"
    freezer.changed(1, removed=True)
    freezer.freeze()
    assert Cycle.alive == 0 and gc.get_freeze_count() > 0


def test_collections_go_on_after_an_import_that_fails() -> None:
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
