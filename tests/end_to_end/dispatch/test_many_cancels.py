"""Thousands of batches are cancelled in one write while the only slot changes hands: it is free afterwards."""

from __future__ import annotations

from pathlib import Path

from peer import ROOT, Peer

MODULE = """
import dspy

class AtOnce(dspy.Module):
    async def aforward(self, **inputs):
        return dspy.Prediction(answer="x")
"""
MANY = 2000
INPUTS = [{"question": "x"}] * 9


def test_the_slot_is_free_after_thousands_of_batches_were_cancelled(tmp_path: Path) -> None:
    """All have begun and wait for a slot for their next item, which each gets after it was cancelled."""
    (tmp_path / "host_modules.py").write_text(MODULE)
    env = {
        "DSPY_BRIDGE_LM": "offline/echo",
        "DSPY_BRIDGE_MAX_IN_FLIGHT": "1",
        "DSPY_BRIDGE_ALLOW_MODULES": "host_modules",
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
    }
    run = {"command": "execute_program", "args": {"program_id": "qa", "inputs": INPUTS}}
    with Peer(env=env) as peer:
        create = {"id": "qa", "signature": "question -> answer", "program_type": "host_modules:AtOnce"}
        assert peer.call("create_program", create)["success"]
        peer.send(*({"id": f"e{n}", **run} for n in range(MANY)))
        while peer.call("list_programs", {"details": True})["result"]["details"][0]["execution_count"] <= MANY:
            pass
        peer.send(*({"cancel": f"e{n}"} for n in range(MANY)))
        assert {reply["error_type"] for reply in peer.receive_all(MANY).values()} == {"cancelled"}
        reply = peer.call("execute_program", {"program_id": "qa", "inputs": {"question": "x"}}, timeout_ms=20_000)
        assert reply["success"], reply
        load = peer.call("get_stats")["result"]
        assert (load["in_flight"], load["queued"]) == (0, 0)
