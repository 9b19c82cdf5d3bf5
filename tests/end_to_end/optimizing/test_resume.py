"""A peer killed in the middle of an optimization: with the disk cache, the same request again repeats no LM call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from optimizing_host import JUDGE, Desk, first_of, right
from tool_host import answer

THREADS = 4


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


def started(desk: Desk, optimizer: str) -> int:
    """With the same cache key for the same optimizer only: what one asks another may ask, too."""
    lm = {"model": f"openai/{optimizer}", **desk.server.options(cache=True)}
    desk.create(lm=lm)
    return desk.start(optimizer, JUDGE, num_threads=THREADS, **({"reflection_lm": lm} if optimizer == "gepa" else {}))


@pytest.mark.parametrize("optimizer", first_of("mipro_v2", "gepa", "random_search", "copro", "simba"))
def test_the_request_again_after_a_kill(undisturbed: Desk, optimizer: str, tmp_path: Path) -> None:
    undisturbed.serve()
    whole = undisturbed.reply_to(started(undisturbed, optimizer))["result"]
    requests = len(undisturbed.server.requests)
    with Desk(env={"DSPY_BRIDGE_DISK_CACHE": str(tmp_path)}) as desk:
        id = started(desk, optimizer)
        while len(desk.server.requests) < requests // 2:
            frame = desk.reply_to(id, until=lambda frame: "tool_call" in frame)
            answer(desk.peer, frame["tool_call"], {"judge": right})
        desk.restart()  # SIGKILL
        result = desk.reply_to(started(desk, optimizer))["result"]
        assert (result["state"], result["score"]) == (whole["state"], whole["score"])
        assert len(desk.server.requests) <= requests + THREADS
        assert 0 < result["lm_calls"] < requests
        again = desk.reply_to(started(desk, optimizer))["result"]
        assert again == {**result, "lm_calls": 0}
