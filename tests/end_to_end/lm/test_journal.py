"""Journaled runs: each LM answer is sent before what follows from it, and a resent run replays what it is given."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import lm_env
from lm_server import LMServer, chat
from peer import PATIENCE, Peer
from shared_peers import shared_peer
from tool_host import answer

TOOL = {"name": "look", "args": {"query": {"type": "str"}}}
SCORED = {"n": 3, "threshold": 2.0, "reward": {"field": "answer", "equals": "never"}}
QA = "question -> answer"
ONE = {"inputs": {"question": "Why?"}}
MODULES = """
import asyncio, threading
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
        asked = len(server.requests)
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
            assert len(server.requests) - before == asked - known + left_out == len(new)
            assert again["meta"]["journal"] == {"replayed": known - left_out, "live": len(new), "unused": 0}
            if known == len(entries):
                assert again["result"] == reply["result"]
                assert fields(rest) == fields(frames)
                assert sorted(map(str, of(rest, "tool_call"))) == sorted(map(str, of(rest, "tool_call")))
                assert all(item.get("replayed") for item in of(rest, "stream") if "chunk" in item) or kind != "predict"
