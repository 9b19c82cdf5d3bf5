"""memory: glibc is told once, trimmed after something large, not too often; another C library is left alone."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from dspy_bridge import memory


class LibC:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def mallopt(self, *_: int) -> None:
        self.asked.append("mallopt")

    def malloc_trim(self, _pad: int) -> None:
        self.asked.append("trim")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("due", False), ("_last", 0.0), ("_tuned", False), ("_libc", None)):
        monkeypatch.setattr(memory, name, value)


def test_told_once_and_trimmed_once_after_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = LibC()
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    for length in (memory.TUNE_BYTES - 1, memory.TUNE_BYTES, memory.LARGE_BYTES - 1):
        memory.seen(length)
        memory.give_back()
    assert libc.asked == ["mallopt", "mallopt"]
    memory.seen(memory.LARGE_BYTES)
    memory.give_back()
    memory.give_back()
    assert libc.asked == ["mallopt", "mallopt", "trim"]


def test_a_second_time_soon_after_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = LibC()
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    for _ in range(2):
        memory.seen(memory.LARGE_BYTES)
        memory.give_back()
    assert libc.asked.count("trim") == 1 and memory.due
    monkeypatch.setattr(memory, "_last", 0.0)
    memory.give_back()
    assert libc.asked.count("trim") == 2 and not memory.due


@pytest.mark.parametrize("library", [object(), OSError("none")])
def test_where_it_cannot_be_done_nothing_happens(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    """As on macOS, whose C library has neither function."""

    def load(_name: None) -> Any:
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    memory.seen(memory.LARGE_BYTES)
    memory.give_back()
    assert not memory.due and memory._libc is None
