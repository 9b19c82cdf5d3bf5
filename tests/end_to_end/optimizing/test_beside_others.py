"""Next to an optimization the peer does everything else as ever, and the program that is optimized stays as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from optimizing_host import EXACT, JUDGE, Desk, fails, first_of, right
from peer import PATIENCE


@pytest.fixture(scope="module", params=[1, 8])
def desks(request: pytest.FixtureRequest) -> Iterator[Desk]:
    with Desk("--max-in-flight", str(request.param)) as desk:
        yield desk


@pytest.fixture
def desk(desks: Desk) -> Iterator[Desk]:
    desks.serve()
    desks.peer.call("cleanup")
    desks.create(demos=[{"question": "word 0", "answer": "a demo"}])
    yield desks
    desks.server.gate.set()


class Traffic:
    """Requests of all kinds at once: the replies by their ids, as `serve` reads frames until all are there."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.replies: dict[int, dict[str, Any]] = {}
        self.open: set[int] = set()
        # By the ids of runs of a judge: the tool calls that wait for them.
        self.judging: dict[int, int] = {}

    def optimize(self, optimizer: str, metric: dict[str, Any] = EXACT, **more: Any) -> int:
        id = self.desk.peer.request("execute_program", self.desk.args(optimizer, metric, **more))
        self.open.add(id)
        return id

    def execute(self, question: str, program_id: str = "qa") -> int:
        args = {"program_id": program_id, "inputs": {"question": question}}
        id = self.desk.peer.request("execute_program", args)
        self.open.add(id)
        return id

    def serve(self) -> None:
        while self.open:
            frame = self.desk.peer.receive(PATIENCE)
            if "tool_call" in frame:
                call = frame["tool_call"]
                judged = self.execute(call["args"]["prediction"]["answer"], "judge")
                self.judging[judged] = call["call_id"]
                continue
            self.open.remove(frame["id"])
            self.replies[frame["id"]] = frame
            if frame["id"] in self.judging:
                assert frame["success"], frame
                call_id = self.judging.pop(frame["id"])
                self.desk.peer.send({"tool_result": {"call_id": call_id, "success": True, "result": 0.5}})


def prompts(desk: Desk) -> set[str]:
    """Of the requests whose question is `asked by hand`: what came before the question."""
    found = set()
    for request in desk.server.requests:
        *before, last = request["messages"]
        if "by hand" in last["content"]:
            found.add(json.dumps(before))
    return found


@pytest.mark.parametrize("optimizer", first_of("mipro_v2", "copro", "simba"))
def test_the_program_stays_as_it_is(desk: Desk, optimizer: str) -> None:
    """Its state, and the prompt of runs before, meanwhile and afterwards."""
    listed = desk.peer.call("list_programs", {"state": True})["result"]["details"][0]["state"]
    traffic = Traffic(desk)
    traffic.execute("by hand")
    optimized = traffic.optimize(optimizer)
    for _ in range(20):
        traffic.execute("by hand")
    traffic.serve()
    traffic.execute("by hand")
    traffic.serve()
    assert all(reply["success"] for reply in traffic.replies.values())
    assert traffic.replies[optimized]["result"]["state"] != listed
    assert len(prompts(desk)) == 1
    assert desk.peer.call("list_programs", {"state": True})["result"]["details"][0]["state"] == listed


@pytest.mark.parametrize("optimizer", first_of("simba", "mipro_v2", "gepa"))
def test_a_judge_may_run_a_program_and_others_too(desk: Desk, optimizer: str) -> None:
    """Also with one slot: no one waits for a slot that is held by who waits for him."""
    desk.create("judge")
    traffic = Traffic(desk)
    optimized = traffic.optimize(optimizer, JUDGE)
    for number in range(10):
        traffic.execute(f"word {number}")
    traffic.serve()
    assert all(reply["success"] for reply in traffic.replies.values())
    assert traffic.replies[optimized]["result"]["metric_calls"] > 0
    desk.becomes_idle()


@pytest.mark.parametrize("desks", [8], indirect=True)
@pytest.mark.parametrize("how", ["success", "cancel", "error", "budget"])
def test_no_more_at_once_than_are_allowed(desk: Desk, how: str) -> None:
    """The third is overloaded; one more goes when one has ended, however it has ended."""
    desk.serve(held_after=1)
    metric = {"judge": fails if how == "error" else right}
    budget = {"lm_calls": 10} if how == "budget" else {}
    one, other = [desk.start("random_search", JUDGE, budget=budget) for _ in range(2)]
    desk.lm_holds(2)
    third = desk.run("labeled_few_shot")
    assert third["error_type"] == "overloaded" and third["error"].endswith("DSPY_BRIDGE_MAX_OPTIMIZES is 2")
    if how == "cancel":
        desk.peer.send({"cancel": one})
        assert desk.reply_to(one)["error_type"] == "cancelled"
        assert desk.run("labeled_few_shot")["success"]
        desk.peer.send({"cancel": other})
        assert desk.reply_to(other)["error_type"] == "cancelled"
    else:
        desk.server.gate.set()
        assert {desk.reply_to(id, metric).get("error_type") for id in (one, other)} == {
            "tool_error" if how == "error" else None
        }
    for _ in range(2):
        assert desk.run("labeled_few_shot")["success"]
