"""The stacks of threads, by C library."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

import pytest

from dspy_bridge.runtime import thread_stacks


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    size = threading.stack_size()
    yield
    threading.stack_size(size)


@pytest.mark.skipif(sys.platform != "linux", reason="musl is for Linux alone")
def test_with_musl_threads_have_the_stack_that_glibc_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows the name, and has no value."""

    def confstr(name: str) -> str:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "confstr", confstr)
    thread_stacks.enlarge()
    assert threading.stack_size() == 8 << 20


def test_elsewhere_they_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    thread_stacks.enlarge()
    assert threading.stack_size() == 0
