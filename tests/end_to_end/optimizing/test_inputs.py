"""Examples: what is wrong is named before an LM is asked; large ones keep nobody waiting."""

from __future__ import annotations

from typing import Any

import pytest
from optimizing_host import JUDGE, Desk, first_of
from peer import PATIENCE

GOOD: tuple[dict[str, Any], dict[str, Any]] = ({"question": "word 1", "count": 1}, {"answer": "WORD 1", "sure": True})
SIGNATURE = "question, count: int -> answer, sure: bool"


@pytest.fixture(scope="module")
def desk_env() -> dict[str, str]:
    return {"DSPY_BRIDGE_MAX_FRAME_BYTES": str(128 << 20)}


WRONG: list[tuple[Any, Any, str]] = [
    ({**GOOD[0], "count": "many"}, GOOD[1], "inputs[{}].count: "),
    ({**GOOD[0], "cuont": 2}, GOOD[1], "inputs[{}]"),
    (None, GOOD[1], "inputs[{}]: expected an object"),
    (GOOD[0], {"answer": "x", "sure": "perhaps"}, "expected[{}].sure: "),
    (GOOD[0], {"sure": True}, "expected[{}].answer: missing"),
    (GOOD[0], None, "expected[{}]: expected an object"),
]


@pytest.mark.parametrize(("inputs", "wanted", "text"), WRONG)
@pytest.mark.parametrize("where", ["", "optimize.valset."])
def test_what_is_wrong_is_named(desk: Desk, inputs: Any, wanted: Any, text: str, where: str) -> None:
    """By its place, of the trainset and of the valset, and nothing is asked."""
    desk.create(signature=SIGNATURE)
    good = [GOOD[0]] * 3, [GOOD[1]] * 3
    bad = [*good[0][:2], inputs], [*good[1][:2], wanted]
    train, val = (good, bad) if where else (bad, good)
    valset = {"inputs": val[0], "expected": val[1]}
    reply = desk.run("random_search", inputs=train[0], wanted=train[1], valset=valset)
    assert reply.get("error_type") == "invalid_args", reply
    assert reply["error"].startswith(where + text.format(2)), reply
    assert desk.server.requests == []


def test_pings_are_answered_while_a_large_trainset_is_read(desk: Desk) -> None:
    """20,000 examples in a frame of 30 MB."""
    inputs = [{"question": f"{number} " + "x" * 1500} for number in range(20_000)]
    wanted = [{"answer": str(number)} for number in range(20_000)]
    id = desk.start("labeled_few_shot", inputs=inputs, wanted=wanted)
    pings = 0
    while True:
        ping = desk.peer.request("ping")
        frame = desk.peer.receive(PATIENCE)
        if frame["id"] == id:
            break
        assert frame["id"] == ping
        pings += 1
    assert frame["success"] and pings > 5
    desk.reply_to(ping)


@pytest.mark.parametrize("optimizer", first_of("mipro_v2", "gepa"))
def test_large_inputs(desk: Desk, optimizer: str) -> None:
    """10 MB each; other runs end meanwhile."""
    inputs = [{"question": "y" * (10 << 20)} for _ in range(2)]
    options = {"simba": {"bsize": 2}}.get(optimizer, {})
    budget = {"lm_calls": 4}
    id = desk.start(optimizer, JUDGE, inputs=inputs, wanted=[{"answer": "x"}] * 2, options=options, budget=budget)
    for _ in range(5):
        assert desk.execute()["success"]
    reply = desk.reply_to(id)
    assert reply["success"], reply
    desk.becomes_idle()
