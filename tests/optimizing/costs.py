"""`make costs`: what an optimization costs, the table of docs/optimizing.md: requests to LMs, metric calls, seconds.

Each optimizer runs in a peer of its own. test_costs.py compares the counts, which are the same each time. The seconds
are those of an LM that takes one for each answer.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from lm_server import KEY, LMServer  # noqa: E402
from optimizing_lm import answer, expected  # noqa: E402
from peer import Peer  # noqa: E402

PAGE = ROOT / "docs" / "optimizing.md"
HEAD = "| optimizer | its options | LM calls | metric calls | seconds |\n| --- | --- | ---: | ---: | ---: |\n"
LATENCY = 1.0
# For the longest, in seconds: SIMBA takes five minutes.
PATIENCE = 1800.0
QUESTIONS = [f"word {number}" for number in range(30)]
TRAIN, VAL = QUESTIONS[:20], QUESTIONS[20:]
_WITH_VALSET = ("random_search", "mipro_v2", "gepa")


class Row(NamedTuple):
    """What is not among the options is as DSPy has it."""

    optimizer: str
    options: dict[str, Any]

    @property
    def cells(self) -> list[str]:
        """The first two, as the page has them."""
        options = ", ".join(f"{name}: {json.dumps(value)}" for name, value in self.options.items())
        return [f"`:{self.optimizer}`", f"`{options}`" if options else "none"]


ROWS = [
    Row("labeled_few_shot", {}),
    Row("bootstrap_few_shot", {}),
    Row("random_search", {"num_candidate_programs": 3}),
    Row("random_search", {}),
    Row("copro", {"breadth": 3, "depth": 2}),
    Row("copro", {}),
    Row("mipro_v2", {}),
    Row("simba", {"bsize": 8, "num_candidates": 3, "max_steps": 2}),
    Row("simba", {"bsize": 20}),
    Row("gepa", {"max_metric_calls": 60}),
    Row("gepa", {"auto": "light"}),
]


def measure(peer: Peer, url: str, row: Row) -> list[str]:
    """The row of the page: one optimization, with an LM at `url`."""
    lm = {"model": "openai/scripted", "api_base": url, "api_key": KEY, "cache": False}
    optimize: dict[str, Any] = {"optimizer": row.optimizer, "options": row.options}
    if row.optimizer in _WITH_VALSET:
        optimize["valset"] = _examples(VAL)
    if row.optimizer == "gepa":
        optimize["reflection_lm"] = lm
    metric = {"field": "answer", "match": "equals"}
    args = {"program_id": "qa", **_examples(TRAIN), "metric": metric, "optimize": optimize}
    created = peer.call("create_program", {"id": "qa", "signature": "question -> answer", "lm": lm})
    assert created["success"], created
    began = time.monotonic()
    peer.request("execute_program", args)
    reply = peer.receive(PATIENCE)
    seconds = time.monotonic() - began
    assert reply["success"], reply
    counts = [f"{reply['result'][of]:,}" for of in ("lm_calls", "metric_calls")]
    return [*row.cells, *counts, f"{seconds:.0f}"]


def _examples(questions: list[str]) -> dict[str, Any]:
    return {
        "inputs": [{"question": asked} for asked in questions],
        "expected": [{"answer": expected(asked)} for asked in questions],
    }


def write_answer(request: dict[str, Any]) -> str:
    """What the LM answers: rightly to a third of the questions, and to all once it has found the instruction."""
    return answer(request["messages"], request.get("temperature"))


def _slow_answer(request: dict[str, Any]) -> str:
    time.sleep(LATENCY)
    return write_answer(request)


def _main() -> None:
    server = LMServer(_slow_answer)
    rows = []
    for row in ROWS:
        with Peer() as peer:
            rows.append(f"| {' | '.join(measure(peer, server.url, row))} |\n")
        print(rows[-1], end="", flush=True)  # noqa: T201
    table = f"<!-- costs -->\n{HEAD}{''.join(rows)}<!-- /costs -->"
    text, found = re.subn("<!-- costs -->\n.*<!-- /costs -->", table, PAGE.read_text(), flags=re.DOTALL)
    assert found == 1
    PAGE.write_text(text)


if __name__ == "__main__":
    _main()
