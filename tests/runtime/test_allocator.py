"""allocator: glibc is tuned once and trimmed after large payloads, not too often; other C libraries are left alone."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from dspy_bridge.runtime import allocator


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
    for name, value in (("trim_due", False), ("_last", 0.0), ("_tuned", False), ("_libc", None)):
        monkeypatch.setattr(allocator, name, value)


def test_told_once_and_trimmed_once_after_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = LibC()
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    for length in (allocator.TUNE_BYTES - 1, allocator.TUNE_BYTES, allocator.LARGE_BYTES - 1):
        allocator.note_payload(length)
        allocator.trim()
    assert libc.asked == ["mallopt", "mallopt"]
    allocator.note_payload(allocator.LARGE_BYTES)
    allocator.trim()
    allocator.trim()
    assert libc.asked == ["mallopt", "mallopt", "trim"]


def test_a_second_time_soon_after_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = LibC()
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    for _ in range(2):
        allocator.note_payload(allocator.LARGE_BYTES)
        allocator.trim()
    assert libc.asked.count("trim") == 1 and allocator.trim_due
    monkeypatch.setattr(allocator, "_last", 0.0)
    allocator.trim()
    assert libc.asked.count("trim") == 2 and not allocator.trim_due


@pytest.mark.parametrize("library", [object(), OSError("none")])
def test_where_it_cannot_be_done_nothing_happens(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    """As on macOS, whose C library has neither function."""

    def load(_name: None) -> Any:
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    allocator.note_payload(allocator.LARGE_BYTES)
    allocator.trim()
    assert not allocator.trim_due and allocator._libc is None


@pytest.mark.parametrize(("before", "after"), [("0", "500"), ("-100\n", "500"), ("500\n", "500"), ("900\n", "900")])
def test_it_gives_way_unless_it_does_more_than_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str, after: str
) -> None:
    file = tmp_path / "oom_score_adj"
    file.write_text(before)
    write = os.write
    # A file keeps what was there before; the one of the kernel does not.
    monkeypatch.setattr(allocator.os, "write", lambda fd, data: (os.ftruncate(fd, 0), write(fd, data))[1])
    monkeypatch.setattr(allocator, "_OOM_FILE", str(file))
    allocator.raise_oom_score()
    assert file.read_text().strip().strip("\0") == after.strip()


def test_without_such_a_file_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(allocator, "_OOM_FILE", str(tmp_path / "none"))
    allocator.raise_oom_score()
    (tmp_path / "odd").write_text("odd")
    monkeypatch.setattr(allocator, "_OOM_FILE", str(tmp_path / "odd"))
    allocator.raise_oom_score()
    assert (tmp_path / "odd").read_text() == "odd"
