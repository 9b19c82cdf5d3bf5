"""The costs of docs/optimizing.md are those of the optimizers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from costs import PAGE, ROWS, Row, measure, write_answer
from lm_server import LMServer
from shared_peers import shared_peer

from dspy_bridge.optimizing.arguments import OPTIMIZERS


def table() -> list[list[str]]:
    found = re.search("<!-- costs -->\n(.*)<!-- /costs -->", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    yield LMServer(write_answer).url


def test_each_optimizer_has_a_row() -> None:
    assert {row.optimizer for row in ROWS} == set(OPTIMIZERS)
    assert [cells[:2] for cells in table()] == [row.cells for row in ROWS]


# The last but two makes 2,224 LM calls.
@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=pytest.mark.slow if row.options == {"bsize": 20} else ()) for n, row in enumerate(ROWS)],
    ids=["-".join([row.optimizer, *row.options]) for row in ROWS],
)
def test_the_counts_of_its_row_are_those_of_a_run(number: int, url: str) -> None:
    row: Row = ROWS[number]
    with shared_peer() as peer:
        assert measure(peer, url, row)[:4] == table()[number][:4]
