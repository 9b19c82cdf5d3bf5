"""The program type that runs code which an LM wrote, in DSPy's local worker: a child process that needs no download.

The sandbox that it has by default is DSPy's too (Deno), and is tried by hand: its first use downloads 100 MB.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import lm_env
from lm_server import chat, script
from peer import ROOT, Peer, until
from shared_peers import shared_peer
from tool_host import ToolError, execute

INIT = f"""
import dspy, sys
def local():
    from dspy.primitives.local_interpreter import LocalInterpreter
    dspy.configure(interpreter_factory=LocalInterpreter)
class Broken:
    def __init__(self):
        raise dspy.CodeInterpreterError("there is no sandbox here\\nat all")
def deno():
    command = [sys.executable, {str(ROOT / "tests" / "fakes" / "deno.py")!r}]
    dspy.configure(interpreter_factory=lambda: dspy.PythonInterpreter(deno_command=command))
def slow_deno():
    command = [sys.executable, {str(ROOT / "tests" / "fakes" / "deno.py")!r}, "slow"]
    dspy.configure(interpreter_factory=lambda: dspy.PythonInterpreter(deno_command=command))
def broken():
    dspy.configure(interpreter_factory=Broken)
"""
CREATE = {"id": "x", "signature": "question -> answer"}
ASK = {"program_id": "x", "inputs": {"question": "Why?"}}
SEARCH = {"name": "search", "args": {"query": {"type": "str"}}}


def code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sandboxed")
    (folder / "sandboxed.py").write_text(INIT)
    return folder


@pytest.fixture
def start(folder: Path, start_lm: Any) -> Iterator[Any]:
    """Starts a peer that may run code, an LM with these answers, and a program."""
    with ExitStack() as peers:

        def start(create: dict[str, Any], *answers: Any, init: str = "local") -> Any:
            server = start_lm(script(*answers))
            env = {
                "DSPY_BRIDGE_ALLOW_CODE": "1",
                "DSPY_BRIDGE_INIT": f"sandboxed:{init}",
                "PYTHONPATH": f"{ROOT}:{folder}",
            }
            peer = peers.enter_context(shared_peer(env={**lm_env(server), **env}))
            reply = peer.call("create_program", {**CREATE, **create})
            assert reply["success"], reply
            return peer, server

        yield start


def prompt(request: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in request["messages"])


def workers(peer: Peer) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(peer.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # just gone
            if re.search("local_interpreter_worker|fakes/deno", " ".join(child.cmdline())):
                found.append(child)
    return found


RLM = {"program_type": "rlm"}


def test_an_rlm_asks_tools_and_a_sub_lm_from_its_code(start: Any, start_lm: Any) -> None:
    sub = start_lm("the sub-LM's word")
    peer, server = start(
        {
            "program_type": "rlm",
            "tools": [SEARCH],
            "options": {"max_iters": 3, "sub_lm": {"model": "openai/sub", **sub.options()}},
        },
        chat(reasoning="r", code=code("found = search(query=question)", "print(found['at'], llm_query('Well?'))")),
        chat(reasoning="r", code=code("SUBMIT(answer=found['at'])")),
    )
    reply, asked = execute(peer, ASK, {"search": lambda query: {"at": f"the {query} page"}})
    assert asked == [("search", {"query": "Why?"})]
    assert reply["result"]["answer"] == "the Why? page" and len(reply["result"]["trajectory"]) == 2
    assert "the Why? page the sub-LM's word" in prompt(server.requests[1])
    assert sub.requests[0]["model"] == "sub" and "Well?" in prompt(sub.requests[0])
    text = prompt(server.requests[0])
    assert "persistent local subprocess" in text and "Pyodide" not in text, "of the sandbox that there is"


def test_code_may_leave_out_arguments_of_a_tool(start: Any) -> None:
    """The sandbox knows no arguments without a default: it sends null, which is not passed on."""
    args = {"query": "str", "most": {"type": "int", "default": 3}, "page": {"type": "int", "optional": True}}
    peer, _ = start(
        {"program_type": "rlm", "tools": [{"name": "search", "args": args}]},
        chat(reasoning="r", code=code("search(query='a')", "search(query='b', most=1, page=2)", "SUBMIT(answer='x')")),
    )
    reply, asked = execute(peer, ASK, {"search": lambda **args: "found"})
    assert reply["result"]["answer"] == "x"
    sent = [{"query": "a", "most": 3}, {"query": "b", "most": 1, "page": 2}]
    assert asked == [("search", args) for args in sent]


def test_a_tool_that_fails_is_an_error_in_the_code(start: Any) -> None:
    def search(query: str) -> Any:
        raise ToolError("no net")

    peer, server = start(
        {"program_type": "rlm", "tools": [SEARCH]},
        chat(reasoning="r", code=code("print(search(query='a'))")),
        chat(reasoning="r", code=code("SUBMIT(answer='gave up')")),
    )
    reply, _ = execute(peer, ASK, {"search": search})
    assert reply["result"]["answer"] == "gave up" and "no net" in prompt(server.requests[1])


LOOPING = chat(reasoning="r", code=code("while True:", "    pass"))


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_code_that_does_not_end_is_ended_with_its_process(start: Any, how: str) -> None:
    peer, _ = start(RLM, LOOPING)
    begin = time.monotonic()
    id = peer.request("execute_program", ASK, **({"timeout_ms": 900} if how == "deadline" else {}))
    until(lambda: workers(peer))
    if how == "cancel":
        peer.send({"cancel": id})
    reply = peer.receive()
    assert reply["error_type"] == ("timeout" if how == "deadline" else "cancelled")
    assert how == "cancel" or 0.8 < time.monotonic() - begin < 1.4
    until(lambda: not workers(peer) and not peer.call("get_stats")["result"]["threads"]["running"])


@pytest.mark.parametrize("init", ["deno", "slow_deno"])
def test_a_sandbox_that_hears_nothing_is_killed(start: Any, init: str) -> None:
    """DSPy's own shutdown is a message, which a busy or starting process does not read."""
    peer, _ = start(RLM, LOOPING, init=init)
    id = peer.request("execute_program", ASK)
    until(lambda: workers(peer))
    peer.send({"cancel": id})
    assert peer.receive()["error_type"] == "cancelled"
    until(lambda: not workers(peer) and not peer.call("get_stats")["result"]["threads"]["running"])
