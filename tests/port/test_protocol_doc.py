"""docs/protocol.md says what the peer does: every example on the page is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

from peer import ROOT, Peer

PAGE = (ROOT / "docs" / "protocol.md").read_text()
EXAMPLES = re.findall(r"```json (send|receive)\n(.*?)\n```", PAGE, re.DOTALL)
# Values that differ from run to run: only their type is compared.
VARY = {
    "timestamp", "duration_ms", "queue_ms", "created_at", "last_executed", "rss", "vms", "uptime", "p50_ms", "p99_ms",
    "pid", "dspy_bridge", "python", "dspy", "psutil", "cloudpickle",
}  # fmt: skip


def same(got: Any, said: Any, name: str = "") -> bool:
    if name in VARY:
        return type(got) is type(said)
    if isinstance(said, dict):
        return isinstance(got, dict) and set(got) == set(said) and all(same(got[k], said[k], k) for k in said)
    if isinstance(said, list):
        return len(got) == len(said) and all(same(g, s) for g, s in zip(got, said, strict=True))
    return type(got) is type(said) and got == said


def test_every_example_is_what_the_peer_does(echo_peer: Peer) -> None:
    assert len(EXAMPLES) > 50
    sent = "nothing"
    for direction, payload in EXAMPLES:
        if direction == "send":
            sent = payload
            echo_peer.send(payload.encode())
        else:
            got = echo_peer.receive()
            assert same(got, json.loads(payload)), f"{sent}\ngave {json.dumps(got)}"


def test_the_frame_made_by_hand() -> None:
    found = re.search(r"```sh\n(.*?)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)
    assert found is not None
    command = found[1].replace("python", sys.executable)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == found[2].strip()


def test_every_error_type_is_in_the_table() -> None:
    from dspy_bridge import errors

    types = {kind.error_type for kind in vars(errors).values() if isinstance(kind, type)}
    assert all(f"| `{kind}` |" in PAGE for kind in types | {"invalid_json", "invalid_request"})
