"""Journaled runs: each LM answer is sent before what follows from it, and a resent run replays what it is given."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import BY_LITELLM, lm_env
from lm_server import Ended, LMServer, chat
from peer import PATIENCE, Peer
from shared_peers import shared_peer
from tool_host import answer

TOOL = {"name": "look", "args": {"query": {"type": "str"}}}
SCORED = {"n": 3, "threshold": 2.0, "reward": {"field": "answer", "equals": "never"}}
QA = "question -> answer"
ONE = {"inputs": {"question": "Why?"}}
MODULES = """
import asyncio, itertools
from types import SimpleNamespace
import dspy

class Both(dspy.Module):
    # Two equal questions at once, and two others one after the other.
    def __init__(self, signature):
        super().__init__()
        self.ask = dspy.Predict(signature)

    async def aforward(self, question):
        first, second = await asyncio.gather(self.ask.acall(question=question), self.ask.acall(question=question))
        try:
            await self.ask.acall(question="fails")
        except dspy.LMError as error:
            third = type(error).__name__
        last = await self.ask.acall(question=f"{first.answer} {second.answer} {third}")
        return dspy.Prediction(answer=f"{first.answer}, {second.answer}, {third}, {last.answer}")

class Sync(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.ask = dspy.Predict(signature)

    def forward(self, question):
        found = dspy.Parallel(num_threads=2, disable_progress_bar=True)([(self.ask, {"question": n}) for n in "ab"])
        return self.ask(question=" ".join(one.answer for one in found))

class Own(dspy.LM):
    # Asks no server: DSPy calls its `forward` in the thread of the module.
    answers = itertools.count(1)

    def forward(self, prompt=None, messages=None, **kwargs):
        number = next(self.answers)
        text = f"[[ ## answer ## ]]\\n{number}\\n\\n[[ ## completed ## ]]"
        message = SimpleNamespace(role="assistant", content=text)
        choice = SimpleNamespace(message=message, finish_reason="stop", index=0)
        return SimpleNamespace(model="own", choices=[choice], usage={"prompt_tokens": 3, "completion_tokens": 4})

class Host(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.ask = dspy.Predict(signature)
        self.ask.lm = Own("openai/own")

    def forward(self, question):
        first = self.ask(question=question)
        return self.ask(question=first.answer)

class Swallows(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.ask = dspy.Predict(signature)

    async def aforward(self, question):
        try:
            return await self.ask.acall(question=question)
        except Exception:
            return dspy.Prediction(answer="swallowed")
"""
# Program, and the run's arguments.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "predict": ({}, ONE),
    "chain_of_thought": ({"program_type": "chain_of_thought"}, ONE),
    "react": ({"program_type": "react", "tools": [TOOL]}, ONE),
    "best_of_n": ({"program_type": "best_of_n", "options": SCORED}, ONE),
    "refine": ({"program_type": "refine", "options": SCORED}, ONE),
    "json": ({"adapter": "json", "program_type": "chain_of_thought"}, ONE),
    "xml": ({"adapter": "xml", "program_type": "chain_of_thought"}, ONE),
    "tools": ({"tools": [TOOL]}, ONE),
    "batch": ({}, {"inputs": [{"question": text} for text in ("a", "a", "b")]}),
    "attempts": ({"signature": "question -> answer: int"}, {**ONE, "attempts": 3}),
    "parallel": ({"program_type": "journaled:Both"}, ONE),
    "threads": ({"program_type": "journaled:Sync"}, ONE),
    "host": ({"program_type": "journaled:Host"}, ONE),
    "cached": ({"lm": {"model": "openai/cached", "cache": True}}, {"inputs": [{"question": "a"}, {"question": "a"}]}),
}


class AnyFormat:
    """An LM that gives each question a new answer, in the adapter's format: one that is paid twice is seen."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)

    def __call__(self, request: dict[str, Any]) -> Any:
        number, text = next(self.numbers), request["messages"][-1]["content"]
        if "fails" in text:
            return 400, {"error": {"message": "no"}}
        whole = json.dumps(request["messages"])
        value = f"no {number}" if "int" in whole and "attempt 2 of 3" not in whole else str(number)
        fields = {"answer": value}
        if "next_tool_name" in whole:
            wanted = "search" if "thought_1" not in text else "finish"
            name = "look" if wanted == "search" else "finish"
            args = {"query": value} if name == "look" else {}
            fields = {"next_thought": value, "next_tool_name": name, "next_tool_args": json.dumps(args)}
            if "reasoning" in whole and "next_tool_name" not in request["messages"][0]["content"]:
                fields = {"reasoning": "r", "answer": value}
        elif "discussion" in whole:
            fields = {"discussion": "d", "advice": "{}"}
        elif "reasoning" in whole:
            fields = {"reasoning": f"r {number}", **fields}
        if "tool_calls" in whole:
            fields["tool_calls"] = json.dumps({"tool_calls": [{"name": "look", "args": {"query": value}}]})
        if re.search(r"<answer>", whole):
            return "\n".join(f"<{name}>{part}</{name}>" for name, part in fields.items())
        if request["messages"][0]["content"].find("JSON object") >= 0 or request.get("response_format"):
            return json.dumps(fields)
        return chat(**fields)


@pytest.fixture
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.getbasetemp() / "journaled"
    folder.mkdir(exist_ok=True)
    (folder / "journaled.py").write_text(MODULES)
    return {"DSPY_BRIDGE_ALLOW_MODULES": "journaled", "PYTHONPATH": f"{folder}:{Path(__file__).resolve().parents[3]}"}


def run(peer: Peer, args: dict[str, Any], journal: list[Any], **envelope: Any) -> tuple[dict[str, Any], list[Any]]:
    """The reply, and the other frames as they came; tools are answered."""
    peer.request("execute_program", {"program_id": "x", **args}, journal=journal, **envelope)
    frames = []
    while "success" not in (frame := peer.receive(PATIENCE)):
        frames.append(frame)
        if "tool_call" in frame:
            answer(peer, frame["tool_call"], {"look": lambda query: f"found {query}"})
    return frame, frames


def of(frames: list[Any], kind: str) -> list[Any]:
    return [frame[kind] for frame in frames if kind in frame]


def calls(frames: list[Any]) -> list[tuple[str, Any]]:
    """The tool calls, whose numbers differ."""
    return [(call["name"], call["args"]) for call in of(frames, "tool_call")]


def fields(frames: list[Any]) -> dict[str, str]:
    """The streamed fields, joined; a reset begins a field anew."""
    found: dict[str, str] = {}
    for item in of(frames, "stream"):
        if "field" in item:
            found[item["field"]] = "" if item.get("reset") else found.get(item["field"], "") + item["chunk"]
    return found


@pytest.mark.parametrize("stream", [False, True], ids=["reply", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_of_a_journal_is_replayed(start_lm: Any, modules: dict[str, str], kind: str, stream: bool) -> None:
    """The LM is asked for the rest alone; results, tool calls and streams are those of the first run."""
    definition, args = KINDS[kind]
    server: LMServer = start_lm(AnyFormat())
    with shared_peer(env={**lm_env(server), **modules}) as peer:
        assert peer.call("create_program", {"id": "x", "signature": QA, **definition})["success"]
        reply, frames = run(peer, args, [], stream=stream)
        assert reply["success"], reply
        entries = of(frames, "journal")
        # What the application's own LM and the cache answer is no request to the server.
        asked = len(entries) if kind in ("host", "cached") else len(server.requests)
        assert reply["meta"] == {"journal": {"replayed": 0, "live": len(entries), "unused": 0}}
        assert [entry["n"] for entry in entries] == list(range(1, len(entries) + 1)) and len(entries) == asked
        # Nothing follows from an answer whose entry was not sent before.
        assert not frames or "journal" in frames[0] or stream
        for known in range(len(entries), -1, -1):
            before = len(server.requests)
            again, rest = run(peer, args, entries[:known], stream=stream)
            new = of(rest, "journal")
            left_out = 1 if known < len(entries) and known and "error" in entries[known - 1] else 0
            assert again["success"], again
            assert asked - known + left_out == len(new)
            assert kind in ("host", "cached") or len(server.requests) - before == len(new)
            assert again["meta"]["journal"] == {"replayed": known - left_out, "live": len(new), "unused": 0}
            if known == len(entries):
                assert again["result"] == reply["result"]
                assert fields(rest) == fields(frames)
                assert [call["args"] for call in of(rest, "tool_call")] == [
                    call["args"] for call in of(frames, "tool_call")
                ]
                assert kind != "predict" or all(item["replayed"] for item in of(rest, "stream"))


def ask(peer: Peer, journal: list[Any] | None = None, **args: Any) -> dict[str, Any]:
    return run(peer, {**ONE, **args}, [] if journal is None else journal)[0]


def test_another_run_is_refused_before_its_lm_is_asked(start_lm: Any, modules: dict[str, str]) -> None:
    """Whatever its module makes of the error: other inputs, another program, another temperature."""
    server: LMServer = start_lm(AnyFormat())
    with shared_peer(env={**lm_env(server), **modules}) as peer:
        peer.call("create_program", {"id": "x", "signature": QA})
        entries = of(run(peer, ONE, [])[1], "journal")
        for args in ({"inputs": {"question": "Who?"}}, {"config": {"temperature": 0.3}}):
            reply = ask(peer, entries, **args)
            assert (reply["error_type"], reply["retryable"]) == ("journal_mismatch", False)
            assert reply["error"].startswith("journal: 1 of its 1 entries fits no call of this run")
            assert reply["meta"] == {"journal": {"replayed": 0, "live": 0, "unused": 1}}
        assert ask(peer, entries, lm={"model": "openai/stub-model", **server.options(api_key="sk-another")})["success"]
        peer.call("create_program", {"id": "x", "signature": "question -> other", "program_type": "journaled:Swallows"})
        assert ask(peer, entries)["error_type"] == "journal_mismatch"
        assert len(server.requests) == 1


ANSWER = {"v": 1, "engine": "litellm", "responses": [{"text": "a"}], "finish_reasons": [], "model": "m", "usage": {}}
ENTRY = {"n": 1, "key": "k", "nth": 0}


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        (3, "journal[1]: expected an object"),
        ({**ENTRY, "n": "1", "error": {"type": "E"}}, "journal[1].n: expected a whole number"),
        ({**ENTRY, "item": -1, "error": {"type": "E"}}, "journal[1].item: expected a whole number"),
        ({**ENTRY, "key": 5, "error": {"type": "E"}}, "journal[1].key: expected text"),
        (ENTRY, "journal[1]: expected an answer or an error"),
        ({**ENTRY, "answer": ANSWER}, "journal[1]: not as it was sent: KeyError: 'cost'"),
        (
            {**ENTRY, "answer": {**ANSWER, "engine": "lm15", "cost": 0}},
            "journal[1]: not as it was sent: KeyError: 'model'",
        ),
        ({**ENTRY, "answer": {**ANSWER, "cost": 0, "responses": [3]}}, "journal[1]: not as it was sent: TypeError"),
        ({**ENTRY, "answer": [[]] * 50_000}, "journal[1]: not as it was sent: TypeError"),
        ({**ENTRY, "error": "E"}, "journal[1]: not as it was sent: TypeError"),
    ],
)
def test_an_entry_that_is_wrong_is_named(echo_peer: Peer, entry: Any, place: str) -> None:
    echo_peer.call("create_program", {"id": "x", "signature": QA})
    reply = ask(echo_peer, [{**ENTRY, "error": {"type": "LMError"}}, entry])
    assert reply["error_type"] == "invalid_args" and reply["error"].startswith(place), reply


def test_a_journal_belongs_to_a_run(echo_peer: Peer) -> None:
    for command, journal in (("execute_program", {}), ("ping", []), ("create_program", [])):
        assert echo_peer.call(command, journal=journal)["error_type"] == "invalid_request"
    echo_peer.call("create_program", {"id": "x", "signature": QA})
    optimize = {"optimizer": "labeled_few_shot"}
    args = {"program_id": "x", "inputs": [], "metric": {"field": "answer", "match": "exact"}, "optimize": optimize}
    assert echo_peer.call("execute_program", args, journal=[])["error"] == "journal: not with optimize"
    reply = ask(echo_peer, [{**ENTRY, "nth": nth, "error": {"type": "E"}} for nth in range(100_001)])
    assert reply["error"] == "journal: 100001 entries; expected at most 100000"


def test_a_client_that_does_not_read_pays_for_one_answer(start_lm: Any) -> None:
    """The next step waits until the entry of the last one is in the pipe."""
    server: LMServer = start_lm(AnyFormat())
    with Peer(env=lm_env(server)) as peer:
        peer.call("create_program", {"id": "x", "signature": QA, "program_type": "react", "tools": [TOOL]})
        peer.call("create_program", {"id": "big", "signature": QA, "lm": {"model": "offline/echo"}})
        big = {"program_id": "big", "inputs": {"question": "x" * 500_000}}
        for _ in range(4):  # more than the pipe takes
            peer.request("execute_program", big)
        peer.request("execute_program", {"program_id": "x", **ONE}, journal=[])
        assert server.arrived.acquire(timeout=PATIENCE)
        assert not server.arrived.acquire(timeout=0.5) and len(server.requests) == 1
        frames = [peer.receive()]
        while "tool_call" not in frames[-1]:
            frames.append(peer.receive())
        assert len(of(frames, "journal")) == 1
        answer(peer, frames[-1]["tool_call"], {"look": lambda query: query})
        assert server.arrived.acquire(timeout=PATIENCE)


@pytest.mark.parametrize("adapter", ["chat", "json"])
def test_several_answers_are_one_entry(start_lm: Any, adapter: str) -> None:
    server: LMServer = start_lm(AnyFormat())
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {"id": "x", "signature": QA, "adapter": adapter, "config": {"n": 3}})
        reply, frames = run(peer, ONE, [])
        (entry,) = of(frames, "journal")
        assert len(entry["answer"]["responses"]) == len(server.requests) == 3
        assert ask(peer, [entry])["result"] == reply["result"] and len(server.requests) == 3


def test_litellms_answers_are_replayed(start_lm: Any) -> None:
    server: LMServer = start_lm(AnyFormat())
    with shared_peer(env=lm_env(server, **BY_LITELLM)) as peer:
        peer.call("create_program", {"id": "x", "signature": QA, "program_type": "react", "tools": [TOOL]})
        for stream in (False, True):
            before = len(server.requests)
            reply, frames = run(peer, ONE, [], stream=stream)
            entries, asked = of(frames, "journal"), len(server.requests)
            assert asked - before == len(entries) and entries[0]["answer"]["engine"] == "litellm"
            again, rest = run(peer, ONE, entries, stream=stream)
            assert again["result"] == reply["result"] and fields(rest) == fields(frames)
            assert len(server.requests) == asked


def test_an_answer_that_was_cut_off_is_refused_again(start_lm: Any) -> None:
    server: LMServer = start_lm(lambda _request: Ended(chat(answer="Par")))
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {"id": "x", "signature": QA})
        reply, frames = run(peer, ONE, [])
        assert reply["error_type"] == "output_invalid"
        again = ask(peer, of(frames, "journal"))
        assert (again["error"], len(server.requests)) == (reply["error"], 1)
        assert ask(peer, of(frames, "journal"), config={"allow_truncated": True})["result"] == {"answer": "Par"}


def test_events_and_history_tell_replayed_calls_without_their_tokens(start_lm: Any) -> None:
    server: LMServer = start_lm(AnyFormat())
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {"id": "x", "signature": QA})
        entries = of(run(peer, ONE, [])[1], "journal")
        meta = run(peer, ONE, entries, lm_events=True, history=True)[0]["meta"]
        (event,), (call,) = meta["lm_events"], meta["history"]
        assert event["replayed"] and call["replayed"] and call["outputs"]
        assert (event["input_tokens"], event["cost_usd"], meta["lm_usage"], meta["cost_usd"]) == (0, 0.0, {}, 0.0)


@pytest.mark.parametrize("kind", ["react", "batch", "threads", "host", "parallel"])
def test_a_budget_of_calls_is_exact(start_lm: Any, modules: dict[str, str], kind: str) -> None:
    """Also for a run that is resumed: what is replayed counts."""
    definition, args = KINDS[kind]
    server: LMServer = start_lm(AnyFormat())
    with shared_peer(env={**lm_env(server), **modules}) as peer:
        peer.call("create_program", {"id": "x", "signature": QA, **definition})
        reply, frames = run(peer, {**args, "budget": {"lm_calls": 1}}, [])
        spent = reply["result"]["results"][-1] if kind == "batch" else reply
        assert (spent["error_type"], spent["error"]) == ("budget_spent", "budget.lm_calls: 1 of 1 are spent")
        assert reply["meta"]["budget"]["lm_calls"] == 1
        assert kind == "host" or len(server.requests) == 1
        again, rest = run(peer, {**args, "budget": {"lm_calls": 2}}, of(frames, "journal"))
        assert (again["meta"]["budget"]["lm_calls"], len(of(rest, "journal"))) == (2, 1)


def test_tokens_are_passed_by_no_more_than_the_calls_in_flight(start_lm: Any) -> None:
    server: LMServer = start_lm(AnyFormat())
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {"id": "x", "signature": QA})
        many = {"inputs": [{"question": str(number)} for number in range(20)], "budget": {"tokens": 100}}
        reply = run(peer, many, [])[0]
        # Each takes 18, so the sixth passes it, and no other is in flight then.
        assert reply["meta"]["budget"] == {"lm_calls": 6, "tokens": 108, "usd": 0.0}
        assert [one["success"] for one in reply["result"]["results"]].count(True) == 6
        unpriced = "budget.usd: DSPy knows no price of openai/stub-model"
        for budget, text in (({"usd": 1}, unpriced), ({"eur": 1}, "budget: "), ({"tokens": True}, "budget: ")):
            reply = ask(peer, budget=budget)
            assert reply["error_type"] == "invalid_args" and reply["error"].startswith(text), reply
        two = {"inputs": [{"question": "a"}, {"question": "b"}], "lm": {"model": "openai/gpt-4o-mini"}}
        reply = run(peer, {**two, "budget": {"usd": 1e-6}}, [])[0]
        assert reply["result"]["results"][1]["error"].startswith("budget.usd: ")
        assert reply["meta"]["budget"]["usd"] > 1e-6
