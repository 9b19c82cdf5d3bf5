"""Undocumented names inside DSPy: where any is gone or called otherwise, programs are created and run all the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peer import ROOT, Peer
from taken_names import NAMES, without

from dspy_bridge.lm import dspy_internals

GONE_ALREADY = sorted(name.dotted for name in dspy_internals.names if not name.there)
ASK = {"inputs": {"question": "Why?"}}
TOOL = {"name": "look", "args": {"query": {"type": "str"}}}
WARNING = re.compile(r"WARNING dspy_bridge: names inside DSPy \S+ are not as expected: .*")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    """Starts peers without these names."""
    peers: list[Peer] = []

    def start(taken: Iterable[dspy_internals.Name], how: str = "gone") -> Peer:
        peers.append(Peer(env={"DSPY_BRIDGE_LM": "offline/echo", **without(taken, how, tmp_path)}))
        return peers[-1]

    yield start
    for peer in peers:
        peer.__exit__()


def run(peer: Peer, program: str, tool_result: str = "42", **envelope: Any) -> tuple[dict[str, Any], list[Any]]:
    """The result of a run, and what came before it."""
    peer.request("execute_program", {"program_id": program, **ASK}, **envelope)
    frames: list[Any] = []
    while "success" not in (frame := peer.receive()):
        frames.append(frame.get("stream") or frame["tool_call"])
        if "tool_call" in frame:
            answer = {"call_id": frame["tool_call"]["call_id"], "success": True, "result": tool_result}
            peer.send({"tool_result": answer})
    assert frame["success"], frame
    return frame["result"], frames


def all_work(peer: Peer, taken: list[dspy_internals.Name]) -> None:
    """A program is created, run and streamed, as is a ReAct; and the missing names are in `get_stats` and the log."""
    for program_type, more in (("predict", {}), ("chain_of_thought", {}), ("react", {"tools": [TOOL]})):
        create = {"id": program_type, "signature": "question -> answer", "program_type": program_type, **more}
        reply = peer.call("create_program", create)
        assert reply["success"], reply
    for program in ("predict", "chain_of_thought"):
        assert run(peer, program, meta=True)[0]["answer"] == "echo: Why?"
    for program_type in ("best_of_n", "refine"):
        options = {"threshold": 1, "reward": {"field": "answer", "equals": "x"}}
        create = {"id": "x", "signature": "question -> answer", "program_type": program_type, "options": options}
        reply = peer.call("create_program", create)
        assert reply["success"], reply
        assert run(peer, "x")[0]["answer"] == "echo: Why?"
    result, pieces = run(peer, "predict", stream=True)
    assert result == {"answer": "echo: Why?"} == {"answer": "".join(piece["chunk"] for piece in pieces)}
    result, _ = run(peer, "react")
    without_tools = dspy_internals.CALLER_MODULES in taken
    assert without_tools or result["trajectory"]["observation_0"] == "42", result
    assert result["answer"] == "echo: Why?"
    gone = sorted({*GONE_ALREADY, *(name.dotted for name in taken)})
    assert peer.call("get_stats")["result"]["degraded"] == gone
    warnings = WARNING.findall(peer.finish()[2])
    assert len(warnings) == (1 if gone else 0)
    assert all(name in warnings[0] for name in gone)


def test_with_all_names_nothing_is_degraded(start: Callable[..., Peer]) -> None:
    all_work(start([]), [])


@pytest.mark.parametrize("how", ["gone", "called"])
def test_without_any_name_plain_programs_work(start: Callable[..., Peer], how: str) -> None:
    """`called`: functions are there, and take other arguments."""
    taken = NAMES if how == "gone" else [name for name in NAMES if name.takes]
    all_work(start(taken, how), taken)


def test_without_any_name_an_lm_is_asked(start: Callable[..., Peer], start_lm: Any) -> None:
    """Its requests only have no traceparent."""
    server = start_lm()
    peer = start(NAMES)
    lm = {"model": "openai/stub", **server.options()}
    assert peer.call("create_program", {"id": "qa", "signature": "question -> answer", "lm": lm})["success"]
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    result, _ = run(peer, "qa", stream=True, traceparent=traceparent)
    assert result == {"answer": "Paris"} and len(server.requests) == 1
    for args, journal in (({}, []), ({"budget": {"lm_calls": 9}}, None)):
        reply = peer.call("execute_program", {"program_id": "qa", **ASK, **args}, journal=journal)
        assert reply["error_type"] == "not_allowed" and "this bridge cannot see all calls of LMs" in reply["error"]


@pytest.mark.slow
@pytest.mark.parametrize("taken", NAMES, ids=lambda name: name.dotted)
def test_without_one_name_plain_programs_work(start: Callable[..., Peer], taken: dspy_internals.Name) -> None:
    all_work(start([taken]), [taken])


def test_a_dspy_that_is_too_old_is_told_in_one_line(tmp_path: Path) -> None:
    """One without engines of its own, as before 3.4."""
    (tmp_path / "sitecustomize.py").write_text("import dspy; del dspy.lm15")
    with Peer(env={"PYTHONPATH": f"{ROOT}:{tmp_path}"}) as peer:
        reply = peer.call("create_program", {"id": "qa", "signature": "question -> answer"})
        assert reply["error_type"] == "internal"
        assert re.match(r"DSPy [\d.]+ is too old; expected 3\.4\.1 or newer; the peer's log", reply["error"])
