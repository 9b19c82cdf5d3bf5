"""docs/protocol.md says what the peer does: every example on the page is run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from peer import ROOT, Peer

from dspy_bridge.wire import messages

PAGE = (ROOT / "docs" / "protocol.md").read_text()
EXAMPLES = re.findall(r"^([→←])\n\n```json\n(.*?)\n```", PAGE, re.MULTILINE | re.DOTALL)
# Values that differ from run to run: only their type is compared.
VARY = {
    "timestamp", "duration_ms", "queue_ms", "created_at", "last_executed", "rss", "vms", "uptime", "p50_ms", "p99_ms",
    "pid", "key", "dspy_bridge", "python", "dspy", "psutil", "cloudpickle",
}  # fmt: skip


def same(got: Any, said: Any, name: str = "") -> bool:
    if name in VARY:
        return type(got) is type(said)
    if isinstance(said, dict):
        return isinstance(got, dict) and set(got) == set(said) and all(same(got[k], said[k], k) for k in said)
    if isinstance(said, list):
        return len(got) == len(said) and all(same(g, s) for g, s in zip(got, said, strict=True))
    return type(got) is type(said) and got == said


def test_every_example_is_what_the_peer_does(fresh_echo_peer: Peer) -> None:
    assert len(EXAMPLES) > 50
    sent = "nothing"
    for direction, payload in EXAMPLES:
        if direction == "→":
            sent = payload
            fresh_echo_peer.send(payload.encode())
        else:
            got = fresh_echo_peer.receive()
            assert same(got, json.loads(payload)), f"{sent}\ngave {json.dumps(got)}"
            assert len({"success", "stream", "tool_call", "journal", "log"} & set(got)) == 1


def test_the_frame_made_by_hand() -> None:
    found = re.search(r"```sh\n(.*?)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)
    assert found is not None
    command = found[1].replace("python", sys.executable)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == found[2].strip()


def test_args_are_nested_as_deep_as_it_says_and_no_deeper(echo_peer: Peer) -> None:
    found = re.search(r"`args` may be nested ([0-9]+) levels deep, itself the first", PAGE)
    assert found is not None
    for lists, success in ((int(found[1]) - 1, True), (int(found[1]), False)):
        echo_peer.send(b'{"id":7,"command":"ping","args":{"a":' + b"[" * lists + b"1" + b"]" * lists + b"}}")
        reply = echo_peer.receive()
        assert (reply["id"], reply["success"]) == (7, success)
    assert reply["error_type"] == "invalid_json"


def test_requests_without_a_deadline_have_none() -> None:
    """The page says to set one."""
    request = messages.decode(b'{"id": 1, "command": "execute_program"}')
    assert isinstance(request, messages.Request) and request.timeout_ms is None


def test_arguments_that_are_not_known_are_refused_where_it_says(echo_peer: Peer) -> None:
    args = {"id": "x", "signature": "a -> b", "program_id": "x", "inputs": {}}
    for name in ("create_program", "execute_program", "cleanup"):
        assert echo_peer.call(name, {**args, "program_idz": []})["error_type"] == "invalid_args"
    for name in ("ping", "list_programs", "get_stats"):
        assert echo_peer.call(name, {"program_idz": []})["success"]
    assert echo_peer.call("cleanup", {"program_ids": ["nobody"]})["success"]
    assert echo_peer.call("list_programs", {"program_ids": ["nobody"]})["result"] == {"programs": []}


def test_every_error_type_is_in_the_table() -> None:
    from dspy_bridge import errors

    types = {kind.error_type for kind in vars(errors).values() if isinstance(kind, type)}
    assert all(f"| `{kind}` |" in PAGE for kind in types | {"invalid_json", "invalid_request"})


def test_the_client_with_a_journal_goes_on_where_it_was(tmp_path: Path) -> None:
    (client,) = re.findall(r"^```python\n(import json, os.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    env = {**os.environ, "DSPY_BRIDGE_LM": "offline/echo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", client, str(tmp_path / "journal")]
    replies = [json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout) for _ in range(2)]
    assert [reply["meta"]["journal"]["replayed"] for reply in replies] == [0, 1]
    assert replies[0]["result"] == replies[1]["result"]
