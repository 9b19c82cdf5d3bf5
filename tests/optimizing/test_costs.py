"""The costs of docs/optimizing.md are those of the optimizers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import get_args

import pytest
from costs import PAGE, ROWS, Row, measure, write_answer
from lm_server import LMServer
from optimizing_host import EVERY
from shared_peers import shared_peer

from dspy_bridge.optimizing.optimizers import Optimizer


def table() -> list[list[str]]:
    found = re.search("<!-- costs -->\n(.*)<!-- /costs -->", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    yield LMServer(write_answer).url


def test_each_optimizer_has_a_row() -> None:
    assert {row.optimizer for row in ROWS} == set(get_args(Optimizer))
    assert [cells[:2] for cells in table()] == [row.cells for row in ROWS]


# Some make hundreds of LM calls, up to 2,224.
TAKEN = [n for n, cells in enumerate(table()) if (EVERY or int(cells[2].replace(",", "")) <= 200)]


@pytest.mark.parametrize("number", TAKEN, ids=["-".join([ROWS[n].optimizer, *ROWS[n].options]) for n in TAKEN])
def test_the_counts_of_its_row_are_those_of_a_run(number: int, url: str) -> None:
    row: Row = ROWS[number]
    with shared_peer() as peer:
        assert measure(peer, url, row)[:4] == table()[number][:4]
