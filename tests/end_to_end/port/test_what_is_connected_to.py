"""Where a peer connects to, as Python's audit events show it: what docs/security.md says leaves the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import BY_LITELLM, lm_env
from lm_server import chat, script
from peer import ROOT, Peer
from tool_host import execute

# Each address that is connected or sent to, and each name that is looked up; also of sockets of child processes.
AUDIT = """
import os, sys
def note(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        where = args[:2] if event.startswith("socket.get") else args[1]
        with open(os.environ["AUDIT"], "a") as file:
            print(*(where if isinstance(where, tuple) else (where,)), file=file)
sys.addaudithook(note)
"""
QA = {"id": "qa", "signature": "picture: image, question -> answer", "program_type": "chain_of_thought"}
ASK = {"picture": "https://pictures.invalid/owl.png", "question": "What is it?"}
SEARCH = [{"name": "search", "args": {"query": "str"}}]
ANSWERS = [
    chat(reasoning="It has feathers.", answer="an owl"),
    chat(next_thought="?", next_tool_name="search", next_tool_args='{"query": "owls"}'),
    chat(next_thought="!", next_tool_name="finish", next_tool_args="{}"),
    chat(reasoning="Found.", answer="birds"),
]


@pytest.mark.parametrize("engine", [{}, pytest.param(BY_LITELLM, marks=pytest.mark.slow)], ids=["DSPy's", "LiteLLM"])
def test_a_peer_connects_to_the_server_of_its_lm_and_to_nothing_else(
    start_lm: Any, tmp_path: Path, engine: dict[str, Any]
) -> None:
    """Neither for prices, updates or telemetry, nor for the address in an input."""
    (tmp_path / "sitecustomize.py").write_text(AUDIT)
    server = start_lm(script(*ANSWERS))
    log = tmp_path / "connections"
    env = {**lm_env(server, **engine), "PYTHONPATH": f"{ROOT}:{tmp_path}", "AUDIT": str(log)}
    with Peer(env=env) as peer:
        assert peer.call("ping")["success"]
        assert peer.call("create_program", QA)["success"]
        agent = {"id": "agent", "signature": "question -> answer", "program_type": "react", "tools": SEARCH}
        assert peer.call("create_program", agent)["success"]
        assert not log.exists()
        reply = peer.call("execute_program", {"program_id": "qa", "inputs": ASK})
        assert reply["success"], reply
        birds = {"program_id": "agent", "inputs": {"question": "Owls?"}}
        reply, asked = execute(peer, birds, {"search": lambda query: query})
        assert reply["success"] and asked == [("search", {"query": "owls"})], reply
        assert peer.finish()[0] == 0
    port = server.url.split(":")[-1].split("/")[0]
    assert set(log.read_text().split("\n")) == {f"127.0.0.1 {port}", ""}
