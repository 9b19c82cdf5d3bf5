"""`--selftest`: sends all six commands and one bad frame to a peer over real pipes, with `offline/echo`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from dspy_bridge.wire import frames

SECONDS = 60


def main() -> int:
    """Run the steps and print a line with its time for each; returns 0 if all passed, else 1."""
    environment = {**os.environ, "DSPY_BRIDGE_LM": "offline/echo", "DSPY_BRIDGE_LM_OPTIONS": ""}
    command = [sys.executable, "-m", "dspy_bridge"]
    # The child must import the same package as this process, installed or not, from any directory.
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    failed = False
    try:
        for number, (name, payload, wanted) in enumerate((*_STEPS, ("end of input: exit 0", None, 0)), 1):
            begin = time.perf_counter()
            reply = _end(peer) if payload is None else _ask(peer, payload)
            took = (time.perf_counter() - begin) * 1000
            good = _contains(reply, wanted)
            failed = failed or not good
            print(f"{'ok' if good else 'FAILED':6} {number} {name:<44} {took:8.1f} ms")  # noqa: T201
            if not good:
                print(f"       expected {wanted}\n       got      {reply}")  # noqa: T201
    finally:
        peer.kill()
        peer.wait()
    return 1 if failed else 0


def _request(number: int, command: str, /, **args: Any) -> bytes:
    return json.dumps({"id": number, "command": command, "args": args}).encode()


_QUESTION = {"question": "What is the capital of France?"}
_STEPS: tuple[tuple[str, bytes, dict[str, Any]], ...] = (
    ("ping, before DSPy is imported", _request(1, "ping"), {"success": True, "result": {"status": "ok"}}),
    (
        "create_program: imports DSPy",
        _request(2, "create_program", id="qa", signature="question -> answer, confidence: float"),
        {"success": True, "result": {"program_id": "qa", "status": "created"}},
    ),
    (
        "execute_program",
        _request(3, "execute_program", program_id="qa", inputs=_QUESTION),
        {"success": True, "result": {"answer": "echo: What is the capital of France?", "confidence": 1.0}},
    ),
    ("list_programs", _request(4, "list_programs"), {"success": True, "result": {"programs": ["qa"]}}),
    ("get_stats", _request(5, "get_stats"), {"success": True, "result": {"programs_count": 1}}),
    ("a frame that is not JSON", b"hello", {"id": None, "success": False, "error_type": "invalid_json"}),
    ("cleanup", _request(7, "cleanup"), {"success": True, "result": {"status": "cleaned", "programs_removed": 1}}),
    (
        "execute_program of what is gone",
        _request(8, "execute_program", program_id="qa", inputs=_QUESTION),
        {"success": False, "error": "Program not found: qa", "error_type": "program_not_found"},
    ),
)


def _ask(peer: subprocess.Popen[bytes], payload: bytes) -> Any:
    assert peer.stdin is not None and peer.stdout is not None
    try:
        peer.stdin.write(frames.header(len(payload)) + payload)
        peer.stdin.flush()
        head = peer.stdout.read(frames.HEADER_BYTES)
        return json.loads(peer.stdout.read(int.from_bytes(head, "big")))
    except (OSError, ValueError) as error:
        return f"no reply: {error}"


def _end(peer: subprocess.Popen[bytes]) -> int:
    assert peer.stdin is not None
    peer.stdin.close()
    return peer.wait(SECONDS)


def _contains(got: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(got, dict) and all(name in got and _contains(got[name], wanted[name]) for name in wanted)
    return bool(got == wanted)
