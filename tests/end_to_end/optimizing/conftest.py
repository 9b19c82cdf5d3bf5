"""A peer and its LM for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from optimizing_host import Desk


@pytest.fixture(scope="module")
def desk_env() -> dict[str, str]:
    """Further settings of the module's peer."""
    return {}


@pytest.fixture(scope="module")
def desks(desk_env: dict[str, str]) -> Iterator[Desk]:
    with Desk(env=desk_env) as desk:
        yield desk


@pytest.fixture
def desk(desks: Desk) -> Iterator[Desk]:
    """It answers, and has the program `qa`."""
    desks.serve()
    desks.create()
    yield desks
    desks.server.gate.set()
