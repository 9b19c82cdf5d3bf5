"""The log of optimizations: no inputs, answers, prompts, bars or escapes, and all that other runs print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_server import Answer
from optimizing_host import SMALL, Desk, lm_answer
from peer import ROOT, Peer

HOST = """
import dspy, sys

class Prints(dspy.Module):
    def forward(self, question):
        print("printed", question)
        print("to stderr", question, file=sys.stderr)
        return dspy.Prediction(answer="x")
"""
# Of questions and answers, instructions, and what DSPy and its libraries would write.
CONTENTS = ("word ", "WORD", "no idea", "capitals", "some ", "Given the fields", "it/s]", "%|", "\x1b", "\r", "broken")


def now_and_then(request: dict[str, Any]) -> Answer:
    """Some questions fail, and some answers cannot be read."""
    last = request["messages"][-1]["content"]
    if "word 3" in last:
        return 500, {"error": {"message": "broken", "type": "error", "code": None}}
    return "word 4 cannot be read" if "word 4" in last else lm_answer(request)


@pytest.mark.parametrize("answer", [now_and_then])
def test_it_has_no_contents(answer: Callable[[dict[str, Any]], Answer], folder: Path) -> None:
    """On stderr and in frames, at its most talkative; others print what they like meanwhile."""
    env = {
        "DSPY_BRIDGE_LOG_FRAMES": "1",
        "DSPY_BRIDGE_LOG_LEVEL": "debug",
        "DSPY_BRIDGE_ALLOW_MODULES": "host",
        "PYTHONPATH": f"{ROOT}:{folder}",
    }
    with Desk(env=env) as desk:
        logged: list[dict[str, Any]] = []
        receive = desk.peer.receive

        def without_logs(patience: float) -> dict[str, Any]:
            while "log" in (frame := receive(patience)):
                logged.append(frame)
            return frame

        desk.peer.receive = without_logs  # type: ignore[method-assign]
        desk.create()
        desk.create("prints", program_type="host:Prints")
        desk.serve(answer)
        for number, optimizer in enumerate(SMALL):
            ended = desk.start(optimizer)
            assert desk.execute(f"line {number}", "prints")["success"]
            desk.reply_to(ended)
            if optimizer != "labeled_few_shot":
                # Bars that are left unfinished.
                desk.serve(answer, held_after=3)
                cut_off = desk.start(optimizer)
                desk.lm_holds(4)
                desk.peer.send({"cancel": cut_off})
                desk.reply_to(cut_off)
                desk.serve(answer)
        desk.becomes_idle()
        desk.peer.receive = receive  # type: ignore[method-assign]
        code, _, log = Peer.finish(desk.peer)
    assert code == 0
    whole = log + "".join(map(str, logged))
    assert [text for text in CONTENTS if text in whole] == [], whole
    loggers = {frame["log"].get("logger", "") for frame in logged}
    assert not any(name.startswith(("dspy.", "gepa", "optuna")) for name in loggers), loggers
    for number in range(len(SMALL)):
        assert f"printed line {number}\n" in log and f"to stderr line {number}\n" in log
