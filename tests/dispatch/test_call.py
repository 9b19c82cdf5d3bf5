"""call: streams, tool calls and slots of running calls. Without DSPy."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from dspy_bridge import logs
from dspy_bridge.commands import batch
from dspy_bridge.dispatch.call import Call
from dspy_bridge.dispatch.dispatcher import Dispatcher
from dspy_bridge.errors import ToolFailed

Work = Callable[[dict[str, Any], Call], Any]


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "exception", lambda error: "r")


class Bench:
    """A dispatcher of one command, `work`, and the frames that it sends."""

    def __init__(self, work: Work, *, full: bool = False, **limits: int) -> None:
        self.frames: queue.Queue[dict[str, Any]] = queue.Queue()
        # Called when there is room again.
        self.waiting_for_room: queue.Queue[Callable[[], object]] = queue.Queue()
        self.full = full

        def limited(args: dict[str, Any], call: Call) -> Any:
            call.limited = True
            return work(args, call)

        limits = {"max_in_flight": 4, "max_queue": 10, "max_frame_bytes": 10_000, **limits}
        self.dispatcher = Dispatcher(
            {"work": limited},
            self._send,
            when_room=self._when_room,
            **limits,
        )

    def _send(self, payloads: Iterable[bytes]) -> None:
        for payload in payloads:
            self.frames.put(json.loads(payload))

    def _when_room(self, callback: Callable[[], object], *, written: bool) -> bool:
        if self.full:
            self.waiting_for_room.put(callback)
        return self.full

    def feed(self, *messages: dict[str, Any]) -> list[Any]:
        given = [self.dispatcher.receive(json.dumps(message).encode()) for message in messages]
        self.dispatcher.wake()
        return [reply and json.loads(reply) for reply in given]

    def request(self, id: int, args: dict[str, Any] | None = None, **more: Any) -> None:
        assert self.feed({"id": id, "command": "work", "args": args or {}, **more}) == [None]

    def next(self) -> dict[str, Any]:
        return self.frames.get(timeout=20)

    def next_tool_call(self) -> dict[str, Any]:
        return self.next()["tool_call"]


async def ask_twice(args: dict[str, Any], call: Call) -> Any:
    """Two tools at once; a failure is reported with its text."""
    answers = await asyncio.gather(call.call_tool("a", {"n": 1}), call.call_tool("b", args), return_exceptions=True)
    return [str(answer) if isinstance(answer, ToolFailed) else answer for answer in answers]


def test_tools_are_asked_at_once_and_answered_in_any_order() -> None:
    bench = Bench(ask_twice)
    bench.request(7)
    calls = {call["name"]: call for call in (bench.next_tool_call(), bench.next_tool_call())}
    assert calls["a"]["args"] == {"n": 1} and calls["b"]["args"] == {}
    bench.feed({"tool_result": {"call_id": calls["b"]["call_id"], "success": False, "error": "no\nluck"}})
    bench.feed({"tool_result": {"call_id": calls["a"]["call_id"], "success": True, "result": {"x": [1]}}})
    assert bench.next() == {"id": 7, "success": True, "result": [{"x": [1]}, "b: no\nluck"]}


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"success": None}, "tool_result.success: expected true or false"),
        ({"success": False}, "tool_result.error: expected text"),
        ({"success": False, "error": 5}, "tool_result.error: expected text"),
    ],
)
def test_a_result_that_cannot_be_read_is_that_tools_failure(result: dict[str, Any], said: str) -> None:
    """The run waits for it, so it must get the error."""
    bench = Bench(ask_twice)
    bench.request(1)
    calls = [bench.next_tool_call(), bench.next_tool_call()]
    for call in calls:
        assert bench.feed({"tool_result": {"call_id": call["call_id"], **result}}) == [None]
    assert bench.next()["result"] == [f"a: {said}", f"b: {said}"]


@pytest.mark.parametrize(
    ("result", "named"),
    [
        ([], "tool_result: expected an object"),
        ({"success": True}, "tool_result.call_id: expected the number"),
        ({"call_id": "1", "success": True}, "tool_result.call_id: expected the number"),
        ({"call_id": True, "success": True}, "tool_result.call_id: expected the number"),
        ({"call_id": 1, "success": True}, "tool_result.call_id: there was no tool call 1"),
        ({"call_id": 0, "success": True}, "tool_result.call_id: there was no tool call 0"),
        ({"call_id": 10**4000, "success": True}, "tool_result.call_id: there was no tool call 1000"),
    ],
)
def test_a_result_for_nobody_is_one_error_without_an_id(result: Any, named: str) -> None:
    """A tool_result without a tool call is a client's mistake, and gets an error reply."""
    (reply,) = Bench(ask_twice).feed({"tool_result": result})
    assert (reply["id"], reply["success"], reply["error_type"]) == (None, False, "invalid_request")
    assert reply["error"].startswith(named) and len(reply["error"]) <= 2000


def test_a_late_or_second_result_is_dropped() -> None:
    """A run may end while its tools still run: their results are dropped without an error."""
    bench = Bench(ask_twice)
    bench.request(1)
    calls = [bench.next_tool_call(), bench.next_tool_call()]
    assert bench.feed({"cancel": 1}) == [None]
    assert bench.next()["error_type"] == "cancelled"
    results = [{"tool_result": {"call_id": call["call_id"], "success": True}} for call in calls * 2]
    assert bench.feed(*results) == [None] * 4
    bench.request(2)
    assert bench.next_tool_call()["call_id"] == 3


def test_code_that_swallows_its_cancellation_waits_for_no_further_tool() -> None:
    """Nobody would answer, and its slot would be lost."""
    ended = threading.Event()

    async def stubborn(args: dict[str, Any], call: Call) -> Any:
        try:
            await call.call_tool("a", {})
        except asyncio.CancelledError:
            try:
                await call.call_tool("b", {})
            finally:
                ended.set()

    bench = Bench(stubborn)
    bench.request(1, timeout_ms=50)
    bench.next_tool_call()
    assert bench.next()["error_type"] == "timeout"
    assert ended.wait(20)
    bench.request(2)
    assert bench.next_tool_call()["name"] == "a"
    assert bench.dispatcher.counts()["in_flight"] == 1


def test_after_the_end_of_input_no_tool_is_waited_for() -> None:
    """Tool calls fail, those made before as well as later ones, and the run goes on to its reply."""

    async def ask_again(args: dict[str, Any], call: Call) -> Any:
        return [await ask_twice(args, call), await ask_twice(args, call)]

    bench = Bench(ask_again)
    bench.request(1)
    bench.next_tool_call(), bench.next_tool_call()
    idle = threading.Event()
    bench.dispatcher.when_idle(idle.set)
    first, second = bench.next()["result"]
    assert first == second == [f"{name}: the end of input has come; no answer can" for name in "ab"]
    assert idle.wait(20)


def test_arguments_too_large_for_a_frame_are_that_tools_failure() -> None:
    async def ask(args: dict[str, Any], call: Call) -> Any:
        return await call.call_tool("a", {"n": "x" * 20_000})

    bench = Bench(ask)
    bench.request(1)
    reply = bench.next()
    assert reply["error_type"] == "frame_too_large" and "tool a" in reply["error"]


def test_a_stream_is_in_order_before_its_reply() -> None:
    async def stream(args: dict[str, Any], call: Call) -> Any:
        for n in range(100):
            await call.stream_item({"n": n})
        return "done"

    bench = Bench(stream)
    bench.request(3)
    assert [bench.next() for _ in range(100)] == [{"id": 3, "stream": {"n": n}} for n in range(100)]
    assert bench.next()["result"] == "done"


def test_a_stream_waits_while_nobody_reads_and_goes_on_when_somebody_does() -> None:
    sent = []

    async def stream(args: dict[str, Any], call: Call) -> Any:
        for n in range(3):
            await call.stream_item({"n": n})
            sent.append(n)
        return "done"

    bench = Bench(stream, full=True)
    bench.request(1)
    assert bench.next()["stream"] == {"n": 0}
    room = bench.waiting_for_room.get(timeout=20)
    assert sent == [] and bench.frames.empty()
    bench.full = False
    room()
    assert [bench.next()["stream"]["n"] for _ in range(2)] == [1, 2]
    assert bench.next()["result"] == "done"


def test_an_item_too_large_for_a_frame_becomes_an_error_in_its_place() -> None:
    async def stream(args: dict[str, Any], call: Call) -> Any:
        await call.stream_item({"index": 5, "success": True, "result": "x" * 20_000})
        return "done"

    bench = Bench(stream)
    bench.request(1)
    item = bench.next()["stream"]
    assert (item["index"], item["success"], item["error_type"]) == (5, False, "frame_too_large")
    assert "result" not in item and bench.next()["success"]


QUICK, STUBBORN = 100, 200


class Batches(Bench):
    """`{"inputs": [items]}`: each waits for the gate and gives itself, an odd one fails.

    `QUICK` does not wait. `STUBBORN` waits also after it was cancelled.
    """

    def __init__(self, **limits: int) -> None:
        self.gate = asyncio.Event()
        self.running = 0
        self.most = 0
        self.started: queue.Queue[int] = queue.Queue()
        super().__init__(self._work, **limits)

    async def _work(self, args: dict[str, Any], call: Call) -> Any:
        if "inputs" in args:
            return await batch.Batch(args, self._one, call).run()
        return await self._one(args["one"])

    async def _one(self, item: int, _ends: float | None = None, _index: int = 0) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        self.started.put(item)
        try:
            if item != QUICK:
                await self.gate.wait()
            if item == STUBBORN:
                await _count([0])
        except asyncio.CancelledError:
            if item != STUBBORN:
                raise
            await self.gate.wait()
        finally:
            self.running -= 1
        if item % 2:
            raise {1: ToolFailed("odd"), 3: SystemExit(3)}.get(item, ZeroDivisionError())
        return item

    def release(self) -> None:
        assert self.dispatcher._loop is not None
        self.dispatcher._loop.call_soon_threadsafe(self.gate.set)


def test_a_batch_gives_each_result_in_order_and_keeps_to_the_limit() -> None:
    bench = Batches(max_in_flight=3)
    bench.request(1, {"inputs": [0, 1, 2, 3, 4, 5, 6, 8]})
    assert {bench.started.get(timeout=20) for _ in range(3)} == {0, 1, 2}
    bench.release()
    results = bench.next()["result"]
    assert [result.get("result") for result in results] == [0, None, 2, None, 4, None, 6, 8]
    assert results[1] == {"success": False, "error": "odd", "error_type": "tool_error"}
    assert [results[at]["error_type"] for at in (3, 5)] == ["internal", "internal"]
    assert bench.most == 3 and bench.dispatcher.counts()["in_flight"] == 0


def test_an_execute_behind_a_batch_gets_its_turn_in_between() -> None:
    """A batch waits for one slot at a time, so that thousands of inputs do not block other runs."""
    bench = Batches(max_in_flight=1)
    bench.request(1, {"inputs": list(range(0, 200, 2))})
    assert bench.started.get(timeout=20) == 0
    bench.request(2, {"one": 1000})
    bench.release()
    order = [bench.started.get(timeout=20) for _ in range(100)]
    assert order.index(1000) <= 1
    assert {bench.next()["id"], bench.next()["id"]} == {1, 2}


async def _count(turns: list[int]) -> None:
    while True:
        turns[0] += 1
        await asyncio.sleep(0)


def test_cancelling_a_batch_cancels_all_its_items() -> None:
    bench = Batches(max_in_flight=2)
    bench.request(1, {"inputs": [0, 2, 4, 6]})
    assert {bench.started.get(timeout=20) for _ in range(2)} == {0, 2}
    bench.feed({"cancel": 1})
    assert bench.next()["error_type"] == "cancelled"
    bench.release()
    bench.request(2, {"one": 8})
    assert bench.next() == {"id": 2, "success": True, "result": 8}
    assert bench.started.get(timeout=20) == 8 and bench.started.empty()
    assert bench.dispatcher.counts()["in_flight"] == 0 and bench.dispatcher.counts()["queued"] == 0


def test_the_slot_is_free_after_a_thousand_batches_were_cancelled() -> None:
    """All have begun and wait for the only slot for their next item, which some get after they were cancelled."""
    # A cancelled one is answered before its place in the queue is free.
    bench = Batches(max_in_flight=1, max_queue=2000)
    for id in range(1000):
        bench.request(id, {"inputs": [QUICK] * 50})
    for _ in range(1001):
        bench.started.get(timeout=20)
    for id in range(1000):
        bench.feed({"cancel": id})
    assert "cancelled" in {bench.next().get("error_type") for _ in range(1000)}
    bench.request(1000, {"one": QUICK})
    reply = bench.next()
    assert reply["success"], reply
    assert bench.dispatcher.counts()["in_flight"] == 0 and bench.dispatcher.counts()["queued"] == 0


def test_a_streamed_batch_sends_each_result_as_it_comes() -> None:
    bench = Batches()
    bench.request(1, {"inputs": [0, 1, 2]}, stream=True)
    for _ in range(3):
        bench.started.get(timeout=20)
    bench.release()
    items = [bench.next()["stream"] for _ in range(3)]
    results = bench.next()["result"]
    for item in items:
        assert {"index": item["index"], **results[item["index"]]} == item
    assert {item["index"] for item in items} == {0, 1, 2}


def test_a_batch_has_no_more_items_at_once_than_it_asks_for() -> None:
    """Other calls get the slots that it leaves."""
    bench = Batches(max_in_flight=4)
    bench.request(1, {"inputs": list(range(0, 40, 2)), "max_concurrency": 2})
    assert {bench.started.get(timeout=20) for _ in range(2)} == {0, 2}
    bench.request(2, {"one": 1000})
    assert bench.started.get(timeout=20) == 1000
    assert bench.started.empty() and bench.dispatcher.counts()["queued"] == 0
    bench.most = 0
    bench.release()
    assert {bench.next()["id"], bench.next()["id"]} == {1, 2}
    assert bench.most <= 3


def test_an_item_that_takes_too_long_is_one_timeout() -> None:
    """It is cancelled; those after it have their own time."""
    bench = Batches(max_in_flight=1)
    bench.request(1, {"inputs": [QUICK, 2, QUICK, 4], "item_timeout_ms": 30})
    results = bench.next()["result"]
    late = {"success": False, "error": "not finished within 30 ms", "error_type": "timeout"}
    assert results == [{"success": True, "result": QUICK}, late, {"success": True, "result": QUICK}, late]
    assert bench.running == 0 and bench.dispatcher.counts()["in_flight"] == 0


def test_an_item_that_does_not_notice_its_end_holds_its_slot_and_not_the_batch() -> None:
    bench = Batches(max_in_flight=1)
    bench.request(1, {"inputs": [STUBBORN], "item_timeout_ms": 10})
    assert bench.next()["result"][0]["error_type"] == "timeout"
    assert bench.dispatcher.counts()["in_flight"] == 1
    bench.request(2, {"one": 6})
    bench.release()
    assert bench.next() == {"id": 2, "success": True, "result": 6}
    assert bench.dispatcher.counts()["in_flight"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_at_its_deadline_a_batch_gives_what_it_has(stream: bool) -> None:
    """The rest are timeouts. Nothing of it runs on."""
    bench = Batches(max_in_flight=1)
    bench.request(1, {"inputs": [QUICK, 1, QUICK]}, timeout_ms=200, stream=stream)
    sent = {frame["index"]: frame for frame in (bench.next()["stream"] for _ in range(3 * stream))}
    reply = bench.next()
    assert reply["success"]
    assert reply["result"] == [
        {"success": True, "result": QUICK},
        *[{"success": False, "error": "not finished within 200 ms", "error_type": "timeout"}] * 2,
    ]
    assert not stream or [sent[index] for index in range(3)] == [
        {"index": index, **result} for index, result in enumerate(reply["result"])
    ]
    bench.request(2, {"one": QUICK})
    assert bench.next()["result"] == QUICK
    load = bench.dispatcher.counts()
    assert (load["in_flight"], load["queued"], bench.running) == (0, 0, 0)
