"""`execute_program` with a list of inputs, and the meta of replies with costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import lm_env
from lm_server import Answer, LMServer, chat
from peer import PATIENCE, Peer

MODEL = "openai/stub-model"


def question(request: dict[str, Any]) -> str:
    """The prompt of a run."""
    return str(request["messages"][-1]["content"]).split("[[ ## question ## ]]\n")[1].split("\n")[0]


def echo(request: dict[str, Any]) -> Answer:
    asked = question(request)
    if asked == "fail":
        return 400, {"error": {"message": "no", "type": "error", "code": None}}
    if asked == "unfit":
        return chat(wrong="x")
    return chat(answer=asked)


class Desk:
    """A peer with eight slots, and its LM."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], Answer] = echo
        self.server = LMServer(lambda request: self.answer(request))
        self.peer = Peer("--max-in-flight", "8", env=lm_env(self.server))

    def start(self, inputs: list[Any], program: str = "qa", **envelope: Any) -> int:
        return self.peer.request("execute_program", {"program_id": program, "inputs": inputs}, **envelope)

    def run(self, inputs: Any, program: str = "qa", args: dict[str, Any] | None = None, **envelope: Any) -> Any:
        asked = {"program_id": program, "inputs": inputs, **(args or {})}
        return self.peer.call("execute_program", asked, **envelope)

    def becomes(self, in_flight: int, queued: int) -> bool:
        """Whether so many run and wait in the end."""
        end = time.monotonic() + 5
        while time.monotonic() < end:
            stats = self.peer.call("get_stats")["result"]
            if (stats["in_flight"], stats["queued"]) == (in_flight, queued):
                return True
        return False


@pytest.fixture(scope="module")
def desks() -> Iterator[Desk]:
    desk = Desk()
    with desk.peer:
        yield desk
    desk.server.stop()


@pytest.fixture
def desk(desks: Desk) -> Iterator[Desk]:
    desks.answer = echo
    # What another test cancelled may reach the server only now.
    assert desks.server.becomes_idle(10)
    desks.server.serve(lambda request: desks.answer(request))
    id = desks.peer.request("create_program", {"id": "qa", "signature": "question -> answer"})
    while desks.peer.receive()["id"] != id:
        pass  # left over by a test that failed
    yield desks
    desks.server.gate.set()


def asks(*questions: str) -> list[dict[str, str]]:
    return [{"question": text} for text in questions]


def test_results_are_in_the_order_of_the_inputs(desk: Desk) -> None:
    """Even if the LM answers the first one last."""
    others = threading.Semaphore(0)

    def answer(request: dict[str, Any]) -> Answer:
        if question(request) == "0":
            for _ in range(6):
                assert others.acquire(timeout=PATIENCE)
        others.release()
        return echo(request)

    desk.answer = answer
    result = desk.run(asks(*"0123456"))["result"]
    assert result == {"results": [{"success": True, "result": {"answer": text}} for text in "0123456"]}


def test_an_item_that_fails_is_its_own_result(desk: Desk) -> None:
    reply = desk.run([*asks("a", "fail"), {"query": "b"}, 5, None, [], *asks("unfit", "c")])
    assert reply["success"]
    results = reply["result"]["results"]
    assert [result.get("error_type") for result in results] == [
        None, "lm_error", "invalid_args", "invalid_args", "invalid_args", "invalid_args", "output_invalid", None,
    ]  # fmt: skip
    assert results[0] == {"success": True, "result": {"answer": "a"}} and results[7]["result"] == {"answer": "c"}
    assert results[1].keys() == {"success", "error", "error_type", "retryable"} and results[1]["success"] is False
    assert "query" in results[2]["error"] and "expected an object" in results[3]["error"]
    assert desk.becomes(0, 0)


def test_config_and_lm_hold_for_all(desk: Desk) -> None:
    args = {"config": {"temperature": 0.9}, "lm": {"model": "openai/other", **desk.server.options()}}
    assert desk.run(asks("a", "b"), args=args)["success"]
    assert [(r["model"], r["temperature"]) for r in desk.server.requests] == [("other", 0.9)] * 2
    results = desk.run(asks("a", "b"), args={"config": {"n": "many"}})["result"]["results"]
    assert [result["error_type"] for result in results] == ["invalid_args"] * 2


def test_no_more_run_at_once_than_may(desk: Desk) -> None:
    """Eight requests reach the LM, the ninth when one of them is answered; another call runs in between."""
    desk.server.gate.clear()
    batch = desk.start(asks(*map(str, range(40))))
    for _ in range(8):
        assert desk.server.arrived.acquire(timeout=PATIENCE)
    assert desk.becomes(8, 1), "a batch waits for one turn at a time"
    single = desk.peer.request("execute_program", {"program_id": "qa", "inputs": {"question": "single"}})
    assert desk.becomes(8, 2)
    assert len(desk.server.requests) == 8
    desk.server.gate.set()
    first, second = desk.peer.receive(), desk.peer.receive()
    assert (first["id"], first["result"]) == (single, {"answer": "single"}), "it does not wait for all of the batch"
    assert second["id"] == batch and len(second["result"]["results"]) == 40
    # Which of those that were let go at once gets to the server first is the threads' affair.
    assert [question(request) for request in desk.server.requests].index("single") < 30


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ten_thousand_items(desk: Desk) -> None:
    lm = {"model": "offline/echo"}
    desk.peer.call("create_program", {"id": "many", "signature": "question -> answer", "lm": lm})
    items = asks(*map(str, range(10_000)))
    items[77] = {"other": "x"}
    id = desk.start(items, "many", meta=True)
    ping = desk.peer.request("ping")
    assert desk.peer.receive()["id"] == ping, "pings do not wait for it"
    # Several seconds of work.
    reply = desk.peer.receive(2 * PATIENCE)
    results = reply["result"]["results"]
    assert reply["id"] == id and len(results) == 10_000
    assert all(
        result == {"success": True, "result": {"answer": f"echo: {n}"}} for n, result in enumerate(results) if n != 77
    )
    assert results[77]["error_type"] == "invalid_args"
    assert reply["meta"]["lm_calls"] == 9999
    assert desk.becomes(0, 0)


def test_each_result_is_streamed_as_soon_as_it_is_there(desk: Desk) -> None:
    """The LM answers one only after the caller has the other's result."""
    heard = threading.Event()

    def answer(request: dict[str, Any]) -> Answer:
        if question(request) == "slow":
            assert heard.wait(PATIENCE)
        return echo(request)

    desk.answer = answer
    id = desk.start(asks("slow", "quick"), stream=True)
    assert desk.peer.receive() == {"id": id, "stream": {"index": 1, "success": True, "result": {"answer": "quick"}}}
    heard.set()
    assert desk.peer.receive() == {"id": id, "stream": {"index": 0, "success": True, "result": {"answer": "slow"}}}
    results = desk.peer.receive()["result"]["results"]
    assert [result["result"]["answer"] for result in results] == ["slow", "quick"]
    assert not any(request.get("stream") for request in desk.server.requests)


def test_a_deadline_in_the_middle_keeps_what_is_done(desk: Desk) -> None:
    """The others are timeouts, just before the deadline; their LM requests are closed, and waiting ones never sent."""
    waiting, through = threading.Event(), threading.Event()

    def answer(request: dict[str, Any]) -> Answer:
        if question(request) == "slow":
            # Not before the quick one: the gate is for all.
            through.wait(PATIENCE)
            if not waiting.is_set():
                desk.server.gate.clear()
            waiting.wait(PATIENCE)
        else:
            through.set()
        return echo(request)

    desk.answer = answer
    id = desk.start(asks("quick", *["slow"] * 30), stream=True, timeout_ms=3000, meta=True)
    assert desk.peer.receive()["stream"]["index"] == 0
    streamed = [desk.peer.receive()["stream"] for _ in range(30)]
    reply = desk.peer.receive()
    waiting.set()
    results = reply["result"]["results"]
    assert reply["id"] == id and results[0] == {"success": True, "result": {"answer": "quick"}}
    assert [result["error"] for result in results[1:]] == ["not finished within 3000 ms"] * 30
    assert all(result["error_type"] == "timeout" and not result["success"] for result in results[1:])
    assert sorted(item["index"] for item in streamed) == list(range(1, 31))
    assert reply["meta"]["duration_ms"] < 3000
    assert reply["meta"]["lm_calls"] == 9, "what was used up to then"
    assert reply["meta"]["lm_usage"][MODEL]["completion_tokens"] == 7
    assert desk.becomes(0, 0) and len(desk.server.requests) <= 9


def test_the_deadline_of_many_items_comes_in_time(start_lm: Callable[..., LMServer]) -> None:
    """With a thousand keys, none of which an error may show: for each item it would take 0.1 ms to look for them."""
    keys = {f"TENANT_{number}_API_KEY": f"key-of-tenant-{number}" for number in range(1000)}
    server = start_lm()
    server.gate.clear()
    with Peer(env={**lm_env(server), **keys}) as peer:
        assert peer.call("create_program", {"id": "qa", "signature": "question -> answer"})["success"]
        inputs = asks("Why?") * 30_000
        reply = peer.call("execute_program", {"program_id": "qa", "inputs": inputs}, timeout_ms=1500, meta=True)
        assert len(reply["result"]["results"]) == 30_000
        assert reply["meta"]["duration_ms"] < 2500
    server.gate.set()


def test_one_that_runs_behind_another_gives_each_item_its_time(desk: Desk) -> None:
    """Of two at once; the LM's request of the slow one is closed."""
    waiting = threading.Event()

    def answer(request: dict[str, Any]) -> Answer:
        if question(request) == "slow":
            waiting.wait(PATIENCE)
        return echo(request)

    desk.answer = answer
    args = {"max_concurrency": 2, "item_timeout_ms": 1000.5}
    results = desk.run(asks("slow", *"abcd"), args=args)["result"]["results"]
    assert results[0] == {"success": False, "error": "not finished within 1000.5 ms", "error_type": "timeout"}
    assert [result.get("result") for result in results[1:]] == [{"answer": text} for text in "abcd"], results
    waiting.set()
    assert desk.becomes(0, 0)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"max_concurrency": 0}, "max_concurrency: expected a whole number of at least 1"),
        ({"max_concurrency": 2.0}, "max_concurrency: expected a whole number of at least 1"),
        ({"max_concurrency": True}, "max_concurrency: expected a whole number of at least 1"),
        ({"item_timeout_ms": 0}, "item_timeout_ms: expected a number of milliseconds greater than 0"),
        ({"item_timeout_ms": "5"}, "item_timeout_ms: expected a number of milliseconds greater than 0"),
        ({"item_timeout_ms": True}, "item_timeout_ms: expected a number of milliseconds greater than 0"),
    ],
)
def test_limits_of_a_batch_that_are_wrong_are_refused_by_name(desk: Desk, args: dict[str, Any], expected: str) -> None:
    reply = desk.run(asks("a"), args=args)
    assert (reply["error_type"], reply["error"]) == ("invalid_args", expected)
    assert not desk.server.requests


def test_a_cancel_closes_the_lms_requests(desk: Desk) -> None:
    desk.server.gate.clear()
    id = desk.start(asks(*map(str, range(20))))
    for _ in range(8):
        assert desk.server.arrived.acquire(timeout=PATIENCE)
    desk.peer.send({"cancel": id})
    reply = desk.peer.receive()
    assert (reply["id"], reply["error_type"]) == (id, "cancelled")
    for _ in range(8):
        assert desk.server.closed_by_client.acquire(timeout=PATIENCE)
    assert desk.becomes(0, 0) and len(desk.server.requests) == 8


def test_a_caller_that_does_not_read_slows_its_streamed_batch(desk: Desk) -> None:
    """Items whose results wait to be sent keep their slots: the LM is not called for the rest."""
    desk.answer = lambda _request: chat(answer="x" * 500_000)
    id = desk.start(asks(*["q"] * 60), stream=True)
    for _ in range(8):
        assert desk.server.arrived.acquire(timeout=PATIENCE)
    count = -1
    while count != (count := len(desk.server.requests)):
        while desk.server.arrived.acquire(timeout=0.5):
            pass
    assert count < 40
    frames = [desk.peer.receive() for _ in range(60)]
    assert all(frame["id"] == id and "stream" in frame for frame in frames)
    assert len(desk.peer.receive()["result"]["results"]) == 60


def test_the_meta_of_a_batch_is_that_of_all_items(desk: Desk) -> None:
    meta = desk.run([*asks("a", "b", "fail"), 5], meta=True)["meta"]
    assert meta["lm_calls"] == 3 and meta["cache_hits"] == 0
    assert meta["lm_usage"][MODEL]["prompt_tokens"] == 22
    assert meta["duration_ms"] > meta["queue_ms"] >= 0


def test_executes_at_once_do_not_mix_their_meta(desk: Desk) -> None:
    """Eight at once, half of them with a second LM call, some with another model."""
    desk.server.gate.clear()
    ids = {}
    for n in range(8):
        asked: dict[str, Any] = {"program_id": "qa", "inputs": {"question": "unfit" if n % 2 else "a"}}
        if n < 4:
            asked["lm"] = {"model": f"openai/own-{n}", **desk.server.options()}
        ids[desk.peer.request("execute_program", asked, meta=True)] = n
    for _ in ids:
        assert desk.server.arrived.acquire(timeout=PATIENCE)
    desk.server.gate.set()
    for id, reply in desk.peer.receive_all(8).items():
        n = ids[id]
        calls = 2 if n % 2 else 1
        assert reply["meta"]["lm_calls"] == calls
        model = f"openai/own-{n}" if n < 4 else MODEL
        assert {name: used["completion_tokens"] for name, used in reply["meta"]["lm_usage"].items()} == {
            model: 7 * calls
        }


def test_several_completions_are_one_call_with_all_their_tokens(desk: Desk) -> None:
    """Each is a separate request."""
    meta = desk.run({"question": "a"}, args={"config": {"n": 3}}, meta=True)["meta"]
    assert meta["lm_calls"] == 1 and meta["lm_usage"][MODEL]["completion_tokens"] == 7 * 3
    assert len(desk.server.requests) == 3


def test_the_time_in_the_queue_is_told(desk: Desk) -> None:
    desk.server.gate.clear()
    asked = {"program_id": "qa", "inputs": {"question": "a"}}
    for _ in range(8):
        desk.peer.request("execute_program", asked)
        assert desk.server.arrived.acquire(timeout=PATIENCE)
    late = desk.peer.request("execute_program", asked, meta=True)
    assert desk.becomes(8, 1)
    desk.server.gate.set()
    meta = desk.peer.receive_all(9)[late]["meta"]
    assert 0 < meta["queue_ms"] < meta["duration_ms"]
    idle = desk.run({"question": "a"}, meta=True)["meta"]
    assert idle["queue_ms"] <= idle["duration_ms"]


def test_calls_from_threads_count(desk: Desk) -> None:
    desk.answer = lambda _request: chat(rationale="r", answer="a")
    args = {
        "id": "mcc",
        "signature": "question -> answer",
        "program_type": "multi_chain_comparison",
        "options": {"M": 1},
    }
    desk.peer.call("create_program", args)
    inputs = {"question": "q", "completions": [{"reasoning": "r", "answer": "a"}]}
    meta = desk.run(inputs, program="mcc", meta=True)["meta"]
    assert (meta["lm_calls"], meta["cache_hits"]) == (1, 0) and meta["lm_usage"][MODEL]["total_tokens"] == 18
