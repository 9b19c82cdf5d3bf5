"""LiteLLM takes seconds to import. Whatever sends a call there for the first time, nobody else waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import BY_LITELLM, lm_env
from peer import ROOT, Peer, until

QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"program_id": "qa", "inputs": {"question": "What is the capital of France?"}}

# LiteLLM's import begins, and never ends.
HELD = """
import os, time
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
import sys

class Held(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "litellm":
            return None
        spec = PathFinder.find_spec(name)
        spec.loader.exec_module = hold
        return spec

def hold(module):
    open(os.path.join(os.path.dirname(__file__), "begun"), "w").close()
    time.sleep(1000)

sys.meta_path.insert(0, Held())
"""
HOST = """
import dspy

class Typed(dspy.Module):
    async def aforward(self, question):
        from dspy.lm15 import Message, Request
        lm = dspy.settings.lm.copy(engine="litellm")
        response = await lm.acall(Request(model=lm.model, messages=(Message.user(question),)))
        return dspy.Prediction(answer=response.text)

class InThread(dspy.Module):
    def forward(self, question):
        return dspy.Predict("question -> answer")(question=question)
"""


def test_while_litellm_is_imported_others_are_served_in_time(start_lm: Any, tmp_path: Path) -> None:
    """In each way that imports it: the settings of an LM or a call, a stream, user modules."""
    (tmp_path / "sitecustomize.py").write_text(HELD)
    (tmp_path / "host.py").write_text(HOST)
    server = start_lm()
    lm = {"model": "openai/stub-model", **server.options()}
    env = {**lm_env(server), "PYTHONPATH": f"{ROOT}:{tmp_path}", "DSPY_BRIDGE_ALLOW_MODULES": "host"}
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        # By then the short steps of calls with this model run on the event loop.
        ({**ASK, "config": {"extra_headers": {"X-Own": "1"}}}, {}),
        ({**ASK, "lm": {**lm, "extra": {"foo": 1}}}, {}),
        ({**ASK, "config": {"max_tokens": -5}}, {}),
        ({**ASK, "lm": {**lm, **BY_LITELLM}}, {}),
        ({**ASK, "lm": {**lm, **BY_LITELLM}}, {"stream": True}),
        ({**ASK, "lm": {**lm, "model": "unheard-of/model"}}, {}),
        ({**ASK, "lm": {**lm, "model_type": "text"}}, {}),
        ({**ASK, "program_id": "Typed"}, {}),
        ({**ASK, "program_id": "Typed"}, {"stream": True}),
        ({**ASK, "program_id": "InThread", "lm": {**lm, "extra": {"foo": 2}}}, {}),
    ]
    with Peer(env=env) as peer:
        assert peer.call("create_program", QA)["success"]
        for name in ("Typed", "InThread"):
            assert peer.call("create_program", {**QA, "id": name, "program_type": f"host:{name}"})["success"]
        for _ in range(10):
            assert peer.call("execute_program", ASK)["success"]
        asked = len(server.requests)
        for args, envelope in ways:
            late = peer.request("execute_program", args, timeout_ms=300, **envelope)
            held = peer.request("execute_program", args, **envelope)
            reply = peer.receive(10)
            assert (reply["id"], reply.get("error_type")) == (late, "timeout"), (args, reply)
            assert peer.call("execute_program", ASK)["success"], args
            peer.send({"cancel": held})
            reply = peer.receive(10)
            assert (reply["id"], reply["error_type"]) == (held, "cancelled"), args
        assert (tmp_path / "begun").exists() and len(server.requests) == asked + len(ways)


def test_with_warm_it_is_imported_when_an_lm_needs_it(start_lm: Any, tmp_path: Path) -> None:
    """And not for an LM that does without; the program is there at once."""
    (tmp_path / "sitecustomize.py").write_text(HELD)
    server = start_lm()
    env = {**lm_env(server), "PYTHONPATH": f"{ROOT}:{tmp_path}", "DSPY_BRIDGE_WARM": "1"}
    with Peer(env=env) as peer:
        assert peer.call("create_program", QA)["success"] and peer.call("execute_program", ASK)["success"]
        assert not (tmp_path / "begun").exists()
        lm = {"model": "openai/stub-model", **server.options(engine="litellm")}
        assert peer.call("create_program", {**QA, "id": "other", "lm": lm})["success"]
        until((tmp_path / "begun").exists)
