"""stdio: how many files the peer may have open."""

from __future__ import annotations

import resource

import pytest

from dspy_bridge.port import stdio

NO_LIMIT = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "connections"),
    [
        (64, 64, None, 32),
        (20, 20, None, 1),
        (1024, 4096, 4096, 4064),
        (1024, 1_048_576, 65_536, 65_504),
        (1024, NO_LIMIT, 65_536, 65_504),
        (100_000, 200_000, None, 99_968),
        (NO_LIMIT, NO_LIMIT, None, 1_000_000),
    ],
)
def test_the_limit_of_open_files_is_raised_and_never_lowered(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int | None, connections: int
) -> None:
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits))
    assert stdio.raise_open_files() == connections
    assert changed == ([] if wanted is None else [(wanted, hard)])


def test_a_system_that_refuses_it_leaves_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, NO_LIMIT))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert stdio.raise_open_files() == 224
