"""dispatcher: one reply per request, whatever its handler does. With handlers of the test, without DSPy."""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
from collections.abc import Iterable
from typing import Any

import pytest
from peer import frame

from dspy_bridge import logs, tracing
from dspy_bridge.dispatch.call import Call
from dspy_bridge.dispatch.dispatcher import Dispatcher
from dspy_bridge.errors import InvalidArgs, Overloaded


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "exception", lambda error: Bench.last._log(error))


class Bench:
    """A dispatcher whose replies can be awaited, and handlers that can be held."""

    last: Bench

    def __init__(self, **limits: int) -> None:
        Bench.last = self
        self.replies: queue.Queue[dict[str, Any]] = queue.Queue()
        self.logged: list[str] = []
        self.started: queue.Queue[int] = queue.Queue()
        self.gate = asyncio.Event()
        self.cancelled: queue.Queue[int] = queue.Queue()
        table = {
            "quick": lambda args, call: args,
            "bad": self._bad,
            "exit": lambda args, call: sys.exit(3),
            "crash": lambda args, call: 1 / 0,
            "work": self._limited,
            "free": lambda args, call: self._work(args, call),
        }
        limits = {"max_in_flight": 2, "max_queue": 2, "max_frame_bytes": 1000, **limits}
        self.dispatcher = Dispatcher(
            table,
            self._send,
            when_room=lambda callback, written: False,
            **limits,
        )

    def _log(self, error: BaseException) -> str:
        reference = f"reference-{len(self.logged)}"
        self.logged.append(f"{reference} {type(error).__name__}")
        return reference

    def _send(self, payloads: Iterable[bytes]) -> None:
        for payload in payloads:
            self.replies.put(json.loads(payload))

    def _bad(self, args: Any, call: Any) -> Any:
        call.on_reply = lambda ok: self.logged.append("kept" if ok else "undone")
        raise InvalidArgs("x: expected\n  text")

    def _limited(self, args: dict[str, Any], call: Any) -> Any:
        call.limited = True
        return self._work(args, call)

    async def _work(self, args: dict[str, Any], call: Any) -> Any:
        call.on_reply = lambda ok: self.logged.append("kept" if ok else "undone")
        self.started.put(call.request.id)
        try:
            if args.get("hold"):
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.put(call.request.id)
            raise
        if "raise" in args:
            raise {"exit": SystemExit(1), "interrupt": KeyboardInterrupt(), "base": BaseException("b")}[args["raise"]]
        return args

    def feed(self, *messages: dict[str, Any]) -> list[dict[str, Any] | None]:
        """One batch, as the reader would give it."""
        given = [self.dispatcher.receive(json.dumps(message).encode()) for message in messages]
        self.dispatcher.wake()
        return [None if reply is None else json.loads(reply) for reply in given]

    def release(self) -> None:
        """Let all held work go on."""
        assert self.dispatcher._loop is not None
        self.dispatcher._loop.call_soon_threadsafe(self.gate.set)

    def next(self) -> dict[str, Any]:
        return self.replies.get(timeout=20)


def work(id: int, **args: Any) -> dict[str, Any]:
    return {"id": id, "command": "work", "args": args}


def test_what_is_quick_is_answered_by_the_reading_thread() -> None:
    bench = Bench()
    (reply,) = bench.feed({"id": 1, "command": "quick", "args": {"a": 1}})
    assert reply == {"id": 1, "success": True, "result": {"a": 1}}
    assert bench.dispatcher._thread is None, "no loop before it is needed"


def test_the_shorter_way_for_pings_is_not_taken_where_a_ping_may_be_too_long() -> None:
    ping = frame(b'{"id":1,"timeout_ms":5000,"command":"ping","args":{},"timestamp":"2026-01-01T00:00:00Z"}')
    pongs: list[bytes] = []
    assert Bench(max_frame_bytes=50).dispatcher.answer_pings(ping, pongs.append) == ping and not pongs
    assert Bench().dispatcher.answer_pings(ping, pongs.append) == b"" and len(pongs) == 1


def test_errors_of_handlers_become_replies() -> None:
    bench = Bench()
    bad, crash, exits, unknown = bench.feed(
        {"id": 1, "command": "bad"},
        {"id": 2, "command": "crash"},
        {"id": 3, "command": "exit"},
        {"id": 4, "command": "nope"},
    )
    assert bad == {"id": 1, "success": False, "error": "x: expected text", "error_type": "invalid_args"}
    assert crash is not None and exits is not None and unknown is not None
    assert crash["error_type"] == exits["error_type"] == "internal"
    assert unknown["error"] == "Unknown command: nope"
    undone, first, second = bench.logged
    assert undone == "undone" and first.endswith("ZeroDivisionError") and second.endswith("SystemExit")
    assert first.split()[0] in crash["error"]


def test_work_and_what_is_logged_of_its_failure_are_in_the_trace_of_their_request() -> None:
    """On either thread, and where one request's end starts another, the traces being held apart."""
    first, second = (f"00-{digit * 32}-{digit * 16}-01" for digit in "ab")

    class Traced(Bench):
        def _log(self, error: BaseException) -> str:
            self.logged.append(f"failed in {tracing.current()}")
            return "reference"

        async def _work(self, args: dict[str, Any], call: Any) -> Any:
            await super()._work(args, call)
            return str(tracing.current())

    bench = Traced(max_in_flight=1, max_queue=9)
    bench.feed({"id": 1, "command": "crash", "traceparent": first}, {"id": 2, "command": "crash"})
    assert bench.logged == [f"failed in {first}", "failed in None"]
    bench.feed(
        {**work(1, hold=True), "traceparent": first},
        {**work(2, **{"raise": "base"}), "traceparent": second},
        work(3),
        work(4, **{"raise": "base"}),
        {**work(5), "traceparent": first},
    )
    bench.started.get(timeout=20)
    bench.release()
    replies = {reply["id"]: reply for reply in (bench.next() for _ in range(5))}
    assert [replies[id].get("result") for id in (1, 3, 5)] == [first, "None", first]
    assert [line for line in bench.logged[2:] if "failed" in line] == [f"failed in {second}", "failed in None"]


@pytest.mark.parametrize("kind", ["exit", "interrupt", "base"])
def test_whatever_work_raises_the_loop_lives_on(kind: str) -> None:
    bench = Bench()
    for id in (1, 2):
        assert bench.feed(work(id, **{"raise": kind})) == [None]
        reply = bench.next()
        assert (reply["id"], reply["error_type"]) == (id, "internal")


def test_a_reply_that_is_too_large_is_an_error_and_is_undone() -> None:
    bench = Bench()
    bench.feed(work(1, text="x" * 1000))
    assert bench.next()["error_type"] == "frame_too_large" and bench.logged == ["undone"]
    bench.feed(work(2))
    assert bench.next()["success"] and bench.logged == ["undone", "kept"]


def test_a_cancel_that_comes_when_the_work_is_done_changes_nothing() -> None:
    """The answer of the race is what was finished, and what it settled stays settled."""
    bench = Bench()
    bench.feed(work(1, hold=True))
    assert bench.started.get(timeout=20) == 1
    loop = bench.dispatcher._loop
    assert loop is not None

    def finish_then_cancel() -> None:
        (call,) = bench.dispatcher._calls.values()
        assert call.task is not None
        # Runs after the step that finishes the task, before the task's own callback.
        loop.call_soon(lambda: loop.call_soon(bench.dispatcher._stop, call, Overloaded("too late")))
        bench.gate.set()

    loop.call_soon_threadsafe(finish_then_cancel)
    assert bench.next()["success"] and bench.logged == ["kept"]


def test_one_that_ignores_its_cancel_answers_once_and_keeps_its_place_until_it_ends() -> None:
    bench = Bench(max_in_flight=1, max_queue=1)
    bench.feed(work(1, hold=True))
    assert bench.started.get(timeout=20) == 1
    bench.feed({"cancel": 1})
    assert bench.next()["error_type"] == "cancelled"
    assert bench.cancelled.get(timeout=20) == 1
    bench.feed(work(2))
    assert bench.next()["id"] == 2 and bench.replies.empty()


def test_work_that_is_not_limited_does_not_wait_for_places() -> None:
    bench = Bench(max_in_flight=1, max_queue=0)
    bench.feed(work(1, hold=True))
    assert bench.started.get(timeout=20) == 1
    bench.feed({"id": 2, "command": "free"}, work(3))
    replies = {reply["id"]: reply for reply in (bench.next(), bench.next())}
    assert replies[2]["success"] and replies[3]["error_type"] == "overloaded"
    bench.release()
    assert bench.next()["id"] == 1


def test_equal_ids_in_flight_each_get_a_reply() -> None:
    bench = Bench()
    bench.feed(work(1, n=1), work(1, n=2))
    assert sorted(bench.next()["result"]["n"] for _ in range(2)) == [1, 2]
    assert bench.dispatcher._calls == {}


def test_a_deadline_counts_from_the_receipt() -> None:
    """Not from when the loop takes the call up, as it may be busy: here, an hour later."""
    bench = Bench()
    bench.dispatcher.receive(json.dumps({**work(1, hold=True), "timeout_ms": 3_600_000}).encode())
    (call,) = bench.dispatcher._inbox
    assert isinstance(call, Call)
    call.received -= 3600
    bench.dispatcher.wake()
    assert bench.next()["error_type"] == "timeout"


def test_idle_is_told_after_the_last_reply_was_sent() -> None:
    bench = Bench()
    at_once = threading.Event()
    bench.dispatcher.when_idle(at_once.set)
    assert at_once.is_set()
    bench.feed(work(1, hold=True))
    assert bench.started.get(timeout=20) == 1
    sent_before: queue.Queue[int] = queue.Queue()
    bench.dispatcher.when_idle(lambda: sent_before.put(bench.replies.qsize()))
    assert bench.dispatcher.unfinished() == 1
    bench.release()
    assert sent_before.get(timeout=20) == 1


def test_a_loop_that_starts_is_not_idle() -> None:
    """Python, which exits then, would refuse what its thread still imports."""
    begun, ready, idle = threading.Event(), threading.Event(), threading.Event()
    bench = Bench()
    bench.dispatcher._on_start = lambda: begun.set() or ready.wait(20)
    bench.dispatcher.start()
    assert begun.wait(20)
    bench.dispatcher.when_idle(idle.set)
    assert not idle.is_set()
    ready.set()
    assert idle.wait(20)
