"""Code that blocks the event loop: it is named in the log, and pings fail, so that a monitor replaces the peer."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import lm_env
from peer import PATIENCE, ROOT, Peer

HOST = '''
import asyncio, dspy, os, time

class Blocks(dspy.Module):
    """Blocks the event loop for so many seconds, or until a file is there."""
    async def aforward(self, question):
        if question.startswith("/"):
            while not os.path.exists(question):
                time.sleep(0.01)
        else:
            time.sleep(float(question))
        return "done"

class Waits(dspy.Module):
    async def aforward(self, question):
        await asyncio.sleep(float(question))
        return "done"

class Imports(dspy.Module):
    async def aforward(self, question):
        import takes_long
        return "done"

class Slips(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.predict = dspy.Predict(signature)
    async def aforward(self, question):
        return self.predict(question=question)

class AsksLM(dspy.Module):
    async def aforward(self, question):
        return dspy.settings.lm(question)[0]

class Forwards(dspy.Module):
    async def aforward(self, question):
        return dspy.settings.lm.forward(question)

class Batches(Slips):
    async def aforward(self, question):
        return self.predict.batch([dspy.Example(question=question).with_inputs("question")])[0]

class HoldsInterpreter(dspy.Module):
    """In a thread: C code that does not let any other thread run."""
    def forward(self, question):
        import re
        begin, size = time.monotonic(), 18
        while time.monotonic() - begin < float(question):
            size += 1
            begin = time.monotonic()
            re.match("(a+)+b", "a" * size)
        return "done"
'''


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def start(*names: str, **env: str) -> Peer:
        settings = {"DSPY_BRIDGE_LM": "offline/echo", "DSPY_BRIDGE_ALLOW_MODULES": "host"}
        peers.append(Peer(env={**settings, "PYTHONPATH": f"{ROOT}:{folder}", **env}))
        for name in names:
            args = {"id": name, "signature": "question -> answer", "program_type": f"host:{name}"}
            assert peers[-1].call("create_program", args)["success"]
        return peers[-1]

    yield start
    for peer in peers:
        peer.__exit__()


def ask(name: str, question: object) -> dict[str, Any]:
    return {"program_id": name, "inputs": {"question": str(question)}}


def ping_until(peer: Peer, wanted: bool) -> dict[str, Any]:
    """Ping until one succeeds, or fails. Replies to other requests are dropped."""
    end = time.monotonic() + PATIENCE
    while True:
        assert time.monotonic() < end
        id = peer.request("ping")
        while (reply := peer.receive())["id"] != id:
            pass
        if reply["success"] is wanted:
            return reply
        time.sleep(0.01)


def test_pings_fail_while_the_loop_is_blocked_and_the_log_names_the_coroutine(start: Any, tmp_path: Path) -> None:
    peer = start("Blocks")
    begin = time.monotonic()
    run = peer.request("execute_program", ask("Blocks", tmp_path / "go"))
    failed = ping_until(peer, wanted=False)
    assert time.monotonic() - begin > 4.9
    assert failed["error_type"] == "internal"
    assert re.fullmatch(
        r"the event loop has been blocked for \d+ s by host\.(Blocks\.)?aforward, line \d+", failed["error"]
    )
    # A ping with its keys in any other form, too.
    assert not peer.call("ping", {"more": [1]})["success"]
    assert peer.call("list_programs")["result"] == {"programs": ["Blocks"]}
    (tmp_path / "go").touch()
    reply = peer.receive()
    assert reply == {"id": run, "success": True, "result": {"answer": "done"}}
    ping_until(peer, wanted=True)
    assert peer.call("execute_program", ask("Blocks", 0))["success"]
    _, _, log = peer.finish()
    (line,) = [line for line in log.splitlines() if "pings fail" in line]
    assert "aforward" in line


def test_a_step_of_more_than_250_ms_is_logged_with_its_coroutine(start: Any) -> None:
    peer = start("Blocks", "Waits")
    assert peer.call("execute_program", ask("Waits", 0.6))["success"]
    assert peer.call("execute_program", ask("Blocks", 0.6))["success"]
    # The next turn of the loop ends the step.
    assert peer.call("execute_program", ask("Waits", 0.2))["success"]
    (line,) = [line for line in peer.finish()[2].splitlines() if "blocked" in line]
    assert re.search(
        r"WARNING dspy_bridge: host\.(Blocks\.)?aforward, line \d+ blocked the event loop for \d\.\d s", line
    )


@pytest.mark.parametrize("offline", [False, True])
def test_a_sync_call_of_an_lm_in_aforward_is_refused(start: Any, start_lm: Any, offline: bool) -> None:
    server = start_lm()
    names = ["Slips", "AsksLM", "Batches", *([] if offline else ["Forwards"])]
    peer = start(*names, **({} if offline else lm_env(server)))
    for name in names:
        reply = peer.call("execute_program", ask(name, "Why?"))
        assert reply["error_type"] == "internal" and "await self.predict.acall(…)" in reply["error"], (name, reply)
    assert not server.requests


@pytest.mark.slow
def test_the_time_that_the_whole_process_stood_still_does_not_count(start: Any, tmp_path: Path) -> None:
    peer = start("Blocks", "HoldsInterpreter")
    peer.request("execute_program", ask("Blocks", tmp_path / "go"))
    peer.request("execute_program", ask("HoldsInterpreter", 0))
    os.kill(peer.process.pid, signal.SIGSTOP)
    time.sleep(6)
    os.kill(peer.process.pid, signal.SIGCONT)
    for _ in range(20):
        id = peer.request("ping")
        while (reply := peer.receive())["id"] != id:
            pass
        assert reply["success"]
    (tmp_path / "go").touch()
    peer.receive()


@pytest.mark.slow
def test_c_code_that_holds_the_interpreter_does_not_count(start: Any) -> None:
    peer = start("HoldsInterpreter")
    peer.request("execute_program", ask("HoldsInterpreter", 6))
    pings = 0
    while True:
        id = peer.request("ping")
        reply = peer.receive()
        if reply["id"] != id:
            break
        assert reply["success"]
        pings += 1
    assert pings > 0 and reply["success"]
    assert "blocked" not in peer.finish()[2]


@pytest.mark.slow
def test_an_import_does_not_count(start: Any, folder: Path) -> None:
    (folder / "takes_long.py").write_text("import time\nfor _ in range(70):\n    time.sleep(0.1)\n")
    peer = start("Imports", "Waits")
    run = peer.request("execute_program", ask("Imports", ""))
    while True:
        id = peer.request("ping")
        reply = peer.receive()
        if reply["id"] == run:
            assert peer.receive()["id"] == id
            break
        assert reply["id"] == id and reply["success"], reply
        time.sleep(0.01)
