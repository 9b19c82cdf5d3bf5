"""What an LM is sent is what plain DSPy sends it, to the byte: nothing that is reused or guarded shows in a prompt."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from lm_server import KEY, LMServer, script, written
from peer import ROOT
from plain_programs import search
from shared_peers import shared_peer
from tool_host import execute

ADAPTERS = ("chat", "json", "xml")
IMAGE = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60)).decode()
ASK = {"question": "Where is the Louvre?"}
ANSWER = {"answer": "Paris"}
THOUGHT = {"reasoning": "I know it.", **ANSWER}
TYPED = "context: list[str], rows: dict[str, int], n: int -> labels: list[Literal['a', 'b']], score: float, ok: bool"
TOOL = {
    "name": "search",
    "description": "Looks something up.",
    "args": {"query": {"type": "str"}, "limit": {"type": "int"}},
}
HISTORY = {"messages": [{"question": "Who?", "answer": "Me."}, {"question": "When?", "answer": "Now."}]}


def step(tool: str, **args: Any) -> dict[str, Any]:
    return {"next_thought": f"I use {tool}.", "next_tool_name": tool, "next_tool_args": args}


# The program, its inputs, and what the LM answers, one request after the other.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {
    "predict": ({}, ASK, [ANSWER]),
    "types": (
        {"signature": TYPED},
        {"context": ["<b>one</b>", "zwei ü"], "rows": {"x": 1}, "n": 3},
        [{"labels": ["a", "b"], "score": 0.5, "ok": True}],
    ),
    "chain_of_thought": ({"program_type": "chain_of_thought"}, ASK, [THOUGHT]),
    "best_of_n": (
        {
            "program_type": "best_of_n",
            "options": {"n": 3, "threshold": 1, "reward": {"field": "answer", "equals": "Paris"}},
        },
        ASK,
        [{"answer": "Rome"}, {"answer": "Lyon"}, ANSWER],
    ),
    "react": (
        {"program_type": "react", "tools": [TOOL], "options": {"max_iters": 5}},
        ASK,
        [
            step("search", query="Louvre", limit=3),
            step("search", query="Louvre", limit=4),
            step("search", query="Paris", limit=1),
            step("finish"),
            THOUGHT,
        ],
    ),
    "demos": ({"demos": [{**ASK, **ANSWER}, {"question": "Which river?", "answer": "The Seine"}]}, ASK, [ANSWER]),
    "history": ({"signature": "history: dspy.History, question -> answer"}, {"history": HISTORY, **ASK}, [ANSWER]),
    "image": ({"signature": "picture: dspy.Image, question -> answer"}, {"picture": IMAGE, **ASK}, [ANSWER]),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_prompts_are_those_of_plain_dspy(start_lm: Callable[..., LMServer], adapter: str) -> None:
    """Twice, as the second run uses what the first one has built."""
    asked = [
        ({"id": name, "signature": "question -> answer", "adapter": adapter, **program}, inputs)
        for name, (program, inputs, _answers) in CASES.items()
    ] * 2
    answers = [written(adapter, **fields) for _, _, each in CASES.values() for fields in each] * 2
    server = start_lm(script(*answers))
    plain = sys.executable, str(ROOT / "tests" / "support" / "plain_programs.py"), server.url, KEY, json.dumps(asked)
    subprocess.run(plain, check=True, timeout=120)
    expected = [json.dumps(request) for request in server.requests]
    assert len(expected) == len(answers)

    server.serve(script(*answers))
    lm = {"model": "openai/stub", **server.options()}
    with shared_peer() as peer:
        for program, inputs in asked:
            reply = peer.call("create_program", {**program, "lm": lm})
            assert reply["success"], reply
            reply, _calls = execute(peer, {"program_id": program["id"], "inputs": inputs}, {"search": search})
            assert reply["success"], reply
    for sent, plainly in zip((json.dumps(request) for request in server.requests), expected, strict=True):
        assert sent == plainly
