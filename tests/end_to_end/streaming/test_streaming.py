"""Streams: the fields of an LM's answer as the LM writes them. One peer and one loopback LM for all tests."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from conftest import lm_env
from lm_server import Answer, LMServer, chat, pieces, written
from peer import PATIENCE, ROOT, Peer

from dspy_bridge.settings import ADAPTERS

HOST = '''
import dspy

class TwoSteps(dspy.Module):
    """A draft, then the answer: both write the program's output."""
    def __init__(self, signature):
        super().__init__()
        self.draft = dspy.ChainOfThought(signature)
        self.last = dspy.Predict("question, draft -> answer, confidence")
    async def aforward(self, question):
        draft = (await self.draft.acall(question=question)).answer
        return await self.last.acall(question=question, draft=draft)

class Sync(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.inner = TwoSteps(signature)
    def forward(self, question):
        draft = self.inner.draft(question=question).answer
        return self.inner.last(question=question, draft=draft)
'''

Frames = list[dict[str, Any]]


class Stage:
    """The peer, and the LM that answers it with `answer` (a function of the request, or the answer)."""

    def __init__(self, folder: Any) -> None:
        (folder / "host.py").write_text(HOST)
        self.answer: Callable[[dict[str, Any]], Answer] | str = chat(answer="Paris")
        self.server = LMServer(lambda request: self.answer(request) if callable(self.answer) else self.answer)
        env = {"DSPY_BRIDGE_ALLOW_MODULES": "host", "PYTHONPATH": f"{ROOT}:{folder}"}
        self.peer = Peer(env={**lm_env(self.server), **env})
        self._ids = itertools.count()

    def create(self, program_type: str = "predict", signature: Any = "question -> answer", **args: Any) -> str:
        id = f"p{next(self._ids)}"
        args = {"id": id, "signature": signature, "program_type": program_type, **args}
        reply = self.peer.call("create_program", args)
        assert reply["success"], reply
        return id

    def start(self, program: str, inputs: Any = None, args: dict[str, Any] | None = None, **envelope: Any) -> int:
        asked = {"program_id": program, "inputs": inputs or {"question": "Where?"}, **(args or {})}
        return self.peer.request("execute_program", asked, **{"stream": True, **envelope})

    def read(self, id: int) -> tuple[Frames, dict[str, Any]]:
        """The stream's items and the reply."""
        frames: Frames = []
        while "stream" in (frame := self.peer.receive()):
            assert frame["id"] == id
            frames.append(frame["stream"])
        assert frame["id"] == id
        return frames, frame

    def run(self, program: str, inputs: Any = None, **more: Any) -> tuple[Frames, dict[str, Any]]:
        return self.read(self.start(program, inputs, **more))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("host"))
    with stage.peer:
        yield stage
    stage.server.stop()


@pytest.fixture
def stage(stages: Stage) -> Stage:
    stages.answer = chat(answer="Paris")
    stages.server.requests.clear()
    assert stages.peer.call("cleanup")["success"]
    return stages


def joined(frames: Frames) -> dict[str, str]:
    """The joined chunks by field."""
    texts: dict[str, str] = {}
    for frame in frames:
        if "field" in frame:
            assert frame.keys() == {"field", "chunk"} and frame["chunk"]
            texts[frame["field"]] = texts.get(frame["field"], "") + frame["chunk"]
    return texts


def test_the_first_chunk_is_there_while_the_lm_still_writes(stage: Stage) -> None:
    """The LM goes on only after the caller has the earlier chunks."""
    read = threading.Semaphore(0)

    def answer(_request: Any) -> Iterator[str]:
        yield "[[ ## answer ## ]]\nIt "
        for word in ("is ", "Paris."):
            assert read.acquire(timeout=PATIENCE)
            yield word
        assert read.acquire(timeout=PATIENCE)
        yield "\n\n[[ ## completed ## ]]"

    stage.answer = answer
    id = stage.start(stage.create())
    for chunk in ("It", " is", " Paris."):
        assert stage.peer.receive() == {"id": id, "stream": {"field": "answer", "chunk": chunk}}
        read.release()
    assert stage.read(id) == ([], {"id": id, "success": True, "result": {"answer": "It is Paris."}})


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_reasoning_is_streamed_before_outputs_that_are_no_texts(stage: Stage, adapter: str) -> None:
    """An answer of a number alone shows nothing before it is there, and its reasoning takes the LM's time."""
    program = stage.create("chain_of_thought", signature="question -> score: float", adapter=adapter)
    stage.answer = written(adapter, reasoning="It is known to all.", score=0.5)
    frames, reply = stage.run(program)
    assert joined(frames) == {"reasoning": "It is known to all."} and len(frames) > 2
    assert reply["result"] == {"reasoning": "It is known to all.", "score": 0.5}


def test_what_the_cache_answers_is_one_chunk(stage: Stage) -> None:
    program = stage.create("chain_of_thought", lm={"model": "openai/cached", **stage.server.options(cache=True)})
    stage.answer = chat(reasoning="It is known.", answer="Paris, in France")
    frames, reply = stage.run(program, meta=True)
    assert len(frames) > 4 and reply["meta"]["cache_hits"] == 0
    frames, again = stage.run(program, meta=True)
    assert frames == [
        {"field": "reasoning", "chunk": "It is known."},
        {"field": "answer", "chunk": "Paris, in France"},
    ]
    assert again["result"] == reply["result"] and again["meta"]["cache_hits"] == 1
    assert len(stage.server.requests) == 1


@pytest.mark.parametrize("kind", ["best_of_n", "refine"])
def test_the_best_of_several_is_one_chunk(stage: Stage, kind: str) -> None:
    answers = iter(
        [chat(answer="Rome"), *[chat(discussion="d", advice="{}")] * (kind == "refine"), chat(answer="Paris")]
    )
    stage.answer = lambda _request: next(answers)
    reward = {"field": "answer", "equals": "Paris"}
    frames, reply = stage.run(stage.create(kind, options={"N": 2, "threshold": 1.0, "reward": reward}))
    assert frames == [{"field": "answer", "chunk": "Paris"}] and reply["result"] == {"answer": "Paris"}


def test_an_answer_that_does_not_fit_is_told_as_such_after_its_chunks(stage: Stage) -> None:
    """After a chunk was sent there is no second attempt; its answer is not streamed."""
    stage.answer = chat(answer="Paris", count="many")
    frames, reply = stage.run(stage.create(signature="question -> answer, count: int"))
    assert joined(frames) == {"answer": "Paris"} and reply["error_type"] == "output_invalid"
    assert len(stage.server.requests) == 1


def test_an_answer_in_the_wrong_format_is_asked_for_again_in_json_and_streamed(stage: Stage) -> None:
    """As without a stream: nothing of the first answer was sent."""
    answers = iter(["Paris, I think.", '{"answer": "Paris, in \\"France\\""}'])
    stage.answer = lambda _request: next(answers)
    frames, reply = stage.run(stage.create())
    assert reply["result"] == {"answer": 'Paris, in "France"'} == joined(frames)
    assert len(frames) > 2 and len(stage.server.requests) == 2


def test_react_tells_its_steps_then_its_fields(stage: Stage) -> None:
    steps = iter(
        [
            chat(next_thought="Look.", next_tool_name="search", next_tool_args='{"query": "France"}'),
            chat(next_thought="Enough.", next_tool_name="finish", next_tool_args="{}"),
            chat(reasoning="It was found.", answer="Paris, in France"),
        ]
    )
    stage.answer = lambda _request: next(steps)
    program = stage.create("react", tools=[{"name": "search", "description": "s", "args": {"query": {"type": "str"}}}])
    id = stage.start(program, meta=True)
    assert stage.peer.receive() == {"id": id, "stream": {"status": "calling tool search"}}
    asked = stage.peer.receive()["tool_call"]
    assert (asked["name"], asked["args"]) == ("search", {"query": "France"})
    stage.peer.send({"tool_result": {"call_id": asked["call_id"], "success": True, "result": "Paris"}})
    frames, reply = stage.read(id)
    assert joined(frames) == {"reasoning": "It was found.", "answer": "Paris, in France"}
    assert not any("status" in frame for frame in frames), "the end is not a tool"
    assert len(frames) > 4 and reply["result"]["answer"] == "Paris, in France"
    assert reply["meta"]["lm_calls"] == 3


@pytest.mark.parametrize("kind", ["TwoSteps", "Sync"])
def test_of_two_predictors_that_write_a_field_the_last_is_heard(stage: Stage, kind: str) -> None:
    def answer(request: dict[str, Any]) -> str:
        last = "`confidence`" in str(request["messages"])
        return chat(answer="Paris, in France", confidence="no") if last else chat(reasoning="r", answer="a draft")

    stage.answer = answer
    frames, reply = stage.run(stage.create(f"host:{kind}"))
    assert joined(frames) == {"answer": "Paris, in France"} and len(frames) > 2
    assert reply["result"] == {"answer": "Paris, in France", "confidence": "no"}
    assert [bool(request.get("stream")) for request in stage.server.requests] == [False, True]


def test_streams_at_once_keep_apart(stage: Stage) -> None:
    """Thirty interleaved runs of one program: each gets its own chunks, in order, and nothing after its reply."""
    begun = threading.Barrier(30)

    def answer(request: dict[str, Any]) -> Iterator[str]:
        number = request["messages"][-1]["content"].split("number ")[1].split()[0]
        yield "[[ ## answer ## ]]\nnumber"
        begun.wait(PATIENCE)
        yield from pieces(f" {number} is mine\n\n[[ ## completed ## ]]")

    stage.answer = answer
    program = stage.create()
    ids = {stage.start(program, {"question": f"number {n} ?"}): n for n in range(30)}
    streams: dict[int, Frames] = {id: [] for id in ids}
    done: set[int] = set()
    order = []
    while len(done) < 30:
        frame = stage.peer.receive()
        id = frame["id"]
        assert id not in done
        order.append(id)
        if "stream" in frame:
            streams[id].append(frame["stream"])
        else:
            assert joined(streams[id]) == frame["result"] == {"answer": f"number {ids[id]} is mine"}
            done.add(id)
    assert len(list(itertools.groupby(order))) > 30


def endless(taken: list[int], stop: threading.Event) -> Iterator[str]:
    yield "[[ ## answer ## ]]\n"
    while not stop.is_set():
        taken[0] += 1
        # LiteLLM gives up an LM that says the same again and again.
        yield f"{taken[0]:>5} " * 170


def test_an_owner_that_does_not_read_slows_the_lm_and_nothing_is_stored(stage: Stage) -> None:
    """The LM writes without end: it gets no further than what the pipes hold, goes on with the reading, and is
    closed by a cancel.
    """
    taken, stop = [0], threading.Event()
    stage.answer = lambda _request: endless(taken, stop)
    process = psutil.Process(stage.peer.process.pid)
    id = stage.start(stage.create())
    assert "stream" in stage.peer.receive()
    stuck = wait_until_still(taken)
    full = process.memory_info().rss
    assert stuck * 1000 < 30_000_000, "more than pipes and sockets hold"
    # On a busy machine it may only have paused.
    assert wait_until_still(taken) * 1000 < 30_000_000 and process.memory_info().rss - full < 1_000_000
    for _ in range(3000):
        assert stage.peer.receive()["id"] == id
    assert wait_until_still(taken) > stuck
    stage.peer.send({"cancel": id})
    frames, reply = stage.read(id)
    assert frames and reply["error_type"] == "cancelled"
    assert stage.server.closed_by_client.acquire(timeout=PATIENCE)
    assert stage.peer.call("get_stats")["result"]["in_flight"] == 0
    stop.set()


def wait_until_still(taken: list[int]) -> int:
    """The count once it has not changed for a third of a second."""
    last, since, end = -1, 0.0, time.monotonic() + PATIENCE
    while last != taken[0] or time.monotonic() - since < 0.3:
        assert time.monotonic() < end, "it goes on and on"
        if last != taken[0]:
            last, since = taken[0], time.monotonic()
        time.sleep(0.02)
    return last


def test_a_deadline_in_mid_stream_closes_the_lms_request(stage: Stage) -> None:
    late = threading.Event()

    def answer(_request: Any) -> Iterator[str]:
        yield "[[ ## answer ## ]]\nPar"
        assert late.wait(PATIENCE)
        yield from itertools.repeat("is ", 100_000)

    stage.answer = answer
    id = stage.start(stage.create(), timeout_ms=1000, meta=True)
    frames, reply = stage.read(id)
    late.set()
    assert joined(frames) == {"answer": "Par"}
    assert reply["error_type"] == "timeout" and reply["meta"]["lm_calls"] == 1 and reply["meta"]["cache_hits"] == 0
    assert stage.server.closed_by_client.acquire(timeout=PATIENCE)
