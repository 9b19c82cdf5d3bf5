"""`execute_program` with a metric: the results of a list of inputs, with scores."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_desk import Desk, asks, fresh, question
from lm_server import Answer, chat
from peer import ROOT, payloads
from tool_host import ToolError

MODEL = "openai/stub-model"
ASKED = ["one", "two", "three", "four", "five", "six", "seven"]
# What the LM answers, and what is expected.
ANSWERS = ["The Eiffel Tower!", "a cat", "rome, in Italy", "", "Berlin", "no", "one one two"]
EXPECTED = ["eiffel tower", "The dog", "rome", "x", "Berlin", "no idea", "one three one"]


def script(request: dict[str, Any]) -> Answer:
    asked = question(request)
    if asked == "fail":
        return 400, {"error": {"message": "no", "type": "error", "code": None}}
    return chat(answer=ANSWERS[ASKED.index(asked)] if asked in ASKED else asked)


@pytest.fixture(scope="module", params=[1, 8])
def desks(request: pytest.FixtureRequest) -> Iterator[Desk]:
    desk = Desk(script, request.param)
    with desk.peer:
        yield desk
    desk.server.stop()


@pytest.fixture
def desk(desks: Desk) -> Iterator[Desk]:
    with fresh(desks, script) as desk:
        yield desk


WANTED = [{"answer": text} for text in EXPECTED]
EXACT = {"field": "answer", "match": "exact_match"}


def test_a_tool_scores_each_result(desk: Desk) -> None:
    """The exact shapes."""
    desk.answer = lambda request: chat(answer="a0" if question(request) == "q0" else "x")
    args = {
        "inputs": asks("q0", "q1"),
        "expected": [{"answer": "a0", "note": 5}, {"answer": "a1"}],
        "metric": {"tool": "exact"},
    }

    def exact(asked: dict[str, Any]) -> Any:
        right = asked["prediction"]["answer"] == asked["example"]["answer"]
        return {"score": 1.0, "feedback": "good"} if right else False

    reply = desk.run(args, exact, stream=True)
    results = [
        {"success": True, "result": {"answer": "a0"}, "score": 1.0, "feedback": "good"},
        {"success": True, "result": {"answer": "x"}, "score": 0.0},
    ]
    assert reply == {"id": reply["id"], "success": True, "result": {"score": 0.5, "failed": 0, "results": results}}
    calls = sorted((call["args"] for call in desk.asked), key=lambda args: str(args["example"]["question"]))
    assert calls[0] == {
        "example": {"question": "q0", "answer": "a0", "note": 5},
        "prediction": {"answer": "a0"},
        "purpose": "score",
    }
    assert all(call["name"] == "exact" for call in desk.asked) and len(desk.asked) == 2
    assert sorted((frame["stream"] for frame in desk.frames), key=lambda item: item["index"]) == [
        {"index": index, **result} for index, result in enumerate(results)
    ]


PLAIN = """
import dspy, json, sys
from dspy.evaluate import answer_exact_match
from dspy.evaluate.metrics import F1
url, asked, expected = json.loads(sys.argv[1])
dspy.configure(lm=dspy.LM("openai/stub-model", api_base=url, api_key="k", cache=False))
data = [dspy.Example(question=q, answer=a).with_inputs("question") for q, a in zip(asked, expected)]
metrics = {
    "exact_match": answer_exact_match,
    "f1": lambda example, got, trace=None: F1(got.answer, [example.answer]),
    "equals": lambda example, got, trace=None: got.answer == example.answer,
    "contains": lambda example, got, trace=None: example.answer in got.answer,
}
program = dspy.Predict("question -> answer")
scores = {
    name: [float(score) for _, _, score in
           dspy.Evaluate(devset=data, metric=metric, num_threads=2, display_progress=False)(program).results]
    for name, metric in metrics.items()
}
print(json.dumps(scores))
"""


def test_scores_are_those_of_plain_dspy(desk: Desk) -> None:
    given = json.dumps([desk.server.url, ASKED, EXPECTED])
    plain = subprocess.run([sys.executable, "-c", PLAIN, given], capture_output=True, text=True, timeout=100)
    assert plain.returncode == 0, plain.stderr
    scores = json.loads(plain.stdout.splitlines()[-1])
    assert len({tuple(found) for found in scores.values()}) == 4, "each metric gives other scores"
    for match, wanted in scores.items():
        args = {"inputs": asks(*ASKED), "expected": WANTED, "metric": {"field": "answer", "match": match}}
        result = desk.run(args)["result"]
        assert [item["score"] for item in result["results"]] == wanted, match
        assert math.isclose(result["score"], sum(wanted) / len(wanted))


def test_values_are_compared_as_json(desk: Desk) -> None:
    """True is not 1, 1 is 1.0, an object has no order; for text others than strings are their JSON."""
    values = [1, 1.0, True, None, {"a": [1], "b": None}, {"b": None, "a": [True]}, [1, "x"], "x"]
    desk.answer = lambda request: chat(answer=json.dumps(values[int(question(request))]))
    signature = {"inputs": [{"name": "question"}], "outputs": [{"name": "answer", "type": "Any"}]}
    assert desk.peer.call("create_program", {"id": "any", "signature": signature})["success"]

    def scores(match: str, expected: list[Any]) -> list[float]:
        args = {
            "program_id": "any",
            "inputs": asks(*map(str, range(len(values)))),
            "expected": [{"answer": value} for value in expected],
            "metric": {"field": "answer", "match": match},
        }
        return [item["score"] for item in desk.run(args)["result"]["results"]]

    assert scores("equals", values) == [1.0] * len(values)
    others = [1.0, 1, 1, False, {"b": None, "a": [True]}, {"a": [1], "b": None}, [True, "x"], ["x"]]
    assert scores("equals", others) == [1.0, 1.0] + [0.0] * 6
    assert scores("contains", ["1", "1.0", "true", "null", '{"a":[1]', "[true]", '"x"', "x"]) == [
        *(1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    ]


def test_a_failure_counts_as_0_and_is_not_scored(desk: Desk) -> None:
    inputs = [*asks("five", "fail"), {"query": "x"}, "none"]
    wanted = [{"answer": "Berlin"}] * 4
    result = desk.run({"inputs": inputs, "expected": wanted, "metric": EXACT})["result"]
    assert (result["score"], result["failed"]) == (0.25, 3)
    assert [item["score"] for item in result["results"]] == [1.0, 0.0, 0.0, 0.0]
    assert [item.get("error_type") for item in result["results"]] == [None, "lm_error", "invalid_args", "invalid_args"]
    reply = desk.run({"inputs": inputs, "metric": {"tool": "judge"}}, lambda _asked: True)
    assert reply["result"]["score"] == 0.25 and len(desk.asked) == 1


def fails(_asked: dict[str, Any]) -> Any:
    raise ToolError("the metric broke")


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        (fails, "judge: the metric broke"),
        (lambda _: "good", "judge: expected a number, a boolean or"),
        (lambda _: None, "judge: expected a number"),
        (lambda _: float("nan"), "judge: "),
        (lambda _: {"feedback": "good"}, "judge: expected a number"),
        (lambda _: {"score": 1, "feedback": 5}, "judge: expected a number"),
        (lambda _: 10**400, "judge: expected a number"),
    ],
)
def test_a_metric_that_fails_ends_the_evaluation_at_once(desk: Desk, tool: Any, text: str) -> None:
    """Not each item's own error: DSPy would ask the LM for all of them."""
    reply = desk.run({"inputs": asks(*["two"] * 300), "metric": {"tool": "judge"}}, tool)
    assert reply["error_type"] == "tool_error" and reply["error"].startswith(text), reply
    desk.becomes_idle()
    assert 1 <= len(desk.server.requests) <= desk.slots and 1 <= len(desk.asked) <= desk.slots


@pytest.mark.parametrize(("status", "name"), [(401, "LMAuthError"), (402, "LMBillingError"), (403, "LMAuthError")])
def test_a_key_or_an_account_that_the_lm_refuses_ends_the_evaluation(desk: Desk, status: int, name: str) -> None:
    """No more requests are made than are in work when the first is refused."""
    desk.answer = lambda _request: (status, {"error": {"message": "refused", "type": "error", "code": None}})
    reply = desk.run({"inputs": asks(*["two"] * 300), "expected": [{"answer": "x"}] * 300, "metric": EXACT})
    assert reply["error_type"] == "lm_error" and reply["retryable"] is False and name in reply["error"]
    desk.becomes_idle()
    assert 1 <= len(desk.server.requests) <= desk.slots


CONTENTS = "s3cret"
HOST = """
import asyncio, dspy

class Breaks(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.inner = dspy.Predict(signature)
    def forward(self, question):
        raise RuntimeError(question + self.inner(question=question).answer)

class Late(dspy.Module):
    async def aforward(self, question):
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            return dspy.Prediction(answer="late")
"""


@pytest.mark.parametrize("frames", ["0", "1"])
def test_contents_are_not_logged(frames: str, tmp_path: Path) -> None:
    """Neither to stderr nor in log frames, whatever ends the evaluation."""
    (tmp_path / "host.py").write_text(HOST)
    logs = {"DSPY_BRIDGE_LOG_FRAMES": frames, "DSPY_BRIDGE_LOG_LEVEL": "debug"}
    env = {**logs, "DSPY_BRIDGE_ALLOW_MODULES": "host", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    desk = Desk(lambda request: chat(answer=f"{CONTENTS} {question(request)}"), **env)
    with desk.peer:
        seen: list[dict[str, Any]] = []
        for id, program_type in {"qa": "predict", "breaks": "host:Breaks"}.items():
            args = {"id": id, "signature": "question -> answer", "program_type": program_type}
            sent = desk.peer.request("create_program", args)
            while (frame := desk.peer.receive()).get("id") != sent:
                seen.append(frame)
            assert frame["success"], frame
        asked = asks(*[f"{CONTENTS} {number}" for number in range(3)])
        expected = [{"answer": CONTENTS, "note": CONTENTS}] * 3
        judge = {"inputs": asked, "expected": expected, "metric": {"tool": "judge"}}

        def raises(_asked: dict[str, Any]) -> Any:
            raise ToolError(CONTENTS)

        ends = [
            (judge, lambda _: {"score": 1, "feedback": CONTENTS}, None),
            (judge, raises, "tool_error"),
            (judge, lambda _: CONTENTS, "tool_error"),
            ({**judge, "metric": EXACT}, None, None),
            ({**judge, "metric": {"field": CONTENTS, "match": "f1"}}, None, "invalid_args"),
            ({**judge, "expected": [{"answer": [CONTENTS]}] * 3}, None, "invalid_args"),
            ({**judge, "program_id": "breaks", "metric": EXACT}, None, None),
            ({**judge, "item_timeout_ms": 1, "metric": EXACT}, None, None),
            ({**judge, "inputs": [{CONTENTS: CONTENTS}] * 3, "metric": EXACT}, None, None),
        ]
        for args, tool, error_type in ends:
            reply = desk.run(args, tool, stream=True)
            assert reply.get("error_type") == error_type, reply
            seen += [frame for frame in desk.frames if "log" in frame]
        desk.answer = lambda _request: (401, {"error": {"message": "no", "type": "error", "code": None}})
        assert desk.run({**judge, "metric": EXACT})["error_type"] == "lm_error"
        seen += desk.frames
        _code, out, err = desk.peer.finish()
    desk.server.stop()
    logged = [frame for frame in [*seen, *payloads(out)] if "log" in frame]
    assert CONTENTS not in err and CONTENTS not in json.dumps(logged)
    assert "RuntimeError" in (json.dumps(logged) if frames == "1" else err), "something is logged"


def test_a_judge_may_run_a_program(desk: Desk) -> None:
    """Also with one slot: an evaluation leaves its own before it asks the metric."""
    id = desk.start({"inputs": asks(*ASKED), "metric": {"tool": "judge"}})
    judged: dict[Any, int] = {}
    scored = 0
    while True:
        frame = desk.peer.receive()
        if "tool_call" in frame:
            call = frame["tool_call"]
            judged[desk.start({"inputs": {"question": call["args"]["prediction"]["answer"]}})] = call["call_id"]
        elif frame["id"] in judged:
            assert frame["success"], frame
            scored += 1
            desk.peer.send({"tool_result": {"call_id": judged[frame["id"]], "success": True, "result": 1}})
        else:
            assert frame["id"] == id and frame["result"]["score"] == 1.0
            break
    assert scored == len(ASKED)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
@pytest.mark.parametrize("where", ["lm", "metric"])
def test_an_end_stops_runs_and_scores(desk: Desk, how: str, where: str) -> None:
    if where == "lm":
        desk.server.gate.clear()
    timeout = {"timeout_ms": 1000} if how == "deadline" else {}
    id = desk.start({"inputs": asks(*["two"] * 50), "metric": {"tool": "judge"}}, **timeout)
    # All of those that may be in work, so that no request is on its way.
    for _ in range(desk.slots):
        if where == "lm":
            assert desk.server.arrived.acquire(timeout=10)
        else:
            call = desk.peer.receive()["tool_call"]
    if how == "cancel":
        desk.peer.send({"cancel": id})
    reply = desk.peer.receive()
    assert reply["id"] == id and "success" in reply
    if how == "cancel":
        assert reply["error_type"] == "cancelled"
    else:
        assert reply["result"]["failed"] == 50 and reply["result"]["score"] == 0.0
        assert {item["error_type"] for item in reply["result"]["results"]} == {"timeout"}
    desk.becomes_idle()
    asked = len(desk.server.requests)
    desk.server.gate.set()
    if where == "metric":
        desk.tell(call, lambda _: 1)
    assert desk.run({"inputs": {"question": "two"}})["success"]
    assert desk.peer.idle() and len(desk.server.requests) == asked + 1


def test_an_items_time_covers_its_score(desk: Desk) -> None:
    id = desk.start({"inputs": asks("two"), "metric": {"tool": "judge"}, "item_timeout_ms": 400})
    call = desk.peer.receive()["tool_call"]
    reply = desk.peer.receive()
    assert reply["id"] == id
    (item,) = reply["result"]["results"]
    assert (item["error_type"], item["score"]) == ("timeout", 0.0)
    desk.tell(call, lambda _: 1)


ONE = {"inputs": asks("one"), "expected": [{"answer": "x"}], "metric": EXACT}
WRONG = [
    ({"inputs": {"question": "one"}, "metric": EXACT}, "metric: only for a list of inputs"),
    ({"inputs": {"question": "one"}, "metric": None}, "expected: only for a list of inputs"),
    ({"metric": None}, "expected: only with a metric"),
    ({"expected": None}, "expected: missing; the metric compares answer with it"),
    ({"expected": []}, "expected: expected 1 objects, one for each of the inputs, got 0"),
    ({"expected": [{}, {}]}, "expected: expected 1 objects, one for each of the inputs, got 2"),
    ({"expected": {"answer": "x"}}, "expected: expected a list of objects"),
    ({"expected": ["x"]}, "expected[0]: expected an object"),
    ({"expected": [{}]}, "expected[0].answer: missing"),
    ({"expected": [{"note": "x"}]}, "expected[0].answer: missing"),
    ({"expected": [{"answer": 5}]}, "expected[0].answer: "),
    ({"expected": [{"answer": "x", "question": "y"}]}, "expected[0].question: an input"),
    ({"metric": "exact"}, "metric: expected an object"),
    ({"metric": {}}, "metric: expected {"),
    ({"metric": {"tool": 5}}, "metric.tool: expected the name"),
    ({"metric": {"tool": ""}}, "metric.tool: expected the name"),
    ({"metric": {"tool": "x", "field": "answer"}}, "metric: expected {"),
    ({"metric": {"field": "answer"}}, "metric: expected {"),
    ({"metric": {"field": "question", "match": "f1"}}, "metric.field: expected one of answer"),
    ({"metric": {"field": [], "match": "f1"}}, "metric.field: expected one of answer"),
    ({"metric": {"field": "answer", "match": "fuzzy"}}, "metric.match: expected one of equals, exact_match, f1"),
    ({"metric": {"field": "answer", "match": {}}}, "metric.match: expected one of equals"),
]


@pytest.mark.parametrize(("changed", "text"), WRONG)
def test_wrong_arguments_are_refused_by_name_before_the_lm_is_asked(
    desk: Desk, changed: dict[str, Any], text: str
) -> None:
    reply = desk.run({**ONE, **changed})
    assert reply["error_type"] == "invalid_args" and reply["error"].startswith(text), reply
    assert desk.server.requests == []
