"""memory: trimmed after something large, not too often, and not at all where the C library cannot."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from dspy_bridge import memory


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (("due", False), ("_last", 0.0), ("_trim", None)):
        monkeypatch.setattr(memory, name, value)
    return


def test_only_what_is_large_is_trimmed_after_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(memory, "_trim", trims.append)
    memory.seen(memory.LARGE_BYTES - 1)
    memory.give_back()
    assert trims == []
    memory.seen(memory.LARGE_BYTES)
    memory.give_back()
    memory.give_back()
    assert trims == [0]


def test_a_second_time_soon_after_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(memory, "_trim", trims.append)
    for _ in range(2):
        memory.seen(memory.LARGE_BYTES)
        memory.give_back()
    assert trims == [0] and memory.due
    monkeypatch.setattr(memory, "_last", 0.0)
    memory.give_back()
    assert trims == [0, 0] and not memory.due


class NoTrim:
    """A C library without malloc_trim, as macOS has it."""


@pytest.mark.parametrize("library", [NoTrim(), OSError("none")])
def test_where_it_cannot_be_done_nothing_happens(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    def load(_name: None) -> Any:
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    memory.seen(memory.LARGE_BYTES)
    memory.give_back()
    assert not memory.due
