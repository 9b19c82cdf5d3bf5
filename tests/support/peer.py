"""The real peer as a child process over real pipes, as a port would run it."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reacts

ROOT = Path(__file__).resolve().parents[2]
# Long enough for DSPy's import on a busy machine; no test waits for it to pass.
PATIENCE = 60.0


def frame(payload: bytes) -> bytes:
    """A packet as `{:packet, 4}` sends it."""
    return len(payload).to_bytes(4, "big") + payload


class Peer:
    """One child. `env` adds to a clean set of settings, without DSPY_BRIDGE_ variables of the caller's environment."""

    def __init__(
        self, *flags: str, env: dict[str, str] | None = None, command: list[str] | None = None, cwd: str = "/"
    ):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DSPY_BRIDGE_")}
        clean["PYTHONPATH"] = str(ROOT)
        self.process = subprocess.Popen(
            [*(command or [sys.executable, "-m", "dspy_bridge"]), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**clean, **reacts.env(), **(env or {})},
            cwd=cwd,
            bufsize=0,
        )
        self.ids = itertools.count(1)
        self._bytes = bytearray()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def send_bytes(self, data: bytes) -> None:
        """Raw bytes, framed or not."""
        assert self.process.stdin is not None
        rest = memoryview(data)
        while rest:
            rest = rest[self.process.stdin.write(rest) :]

    def send(self, *messages: bytes | dict[str, Any]) -> None:
        """Payloads or messages, each in a frame, in one write."""
        payloads = [m if isinstance(m, bytes) else json.dumps(m).encode() for m in messages]
        self.send_bytes(b"".join(frame(payload) for payload in payloads))

    def request(self, name: str, args: dict[str, Any] | None = None, **envelope: Any) -> int:
        """Send a command under the next id, which is returned."""
        id = next(self.ids)
        self.send({"id": id, "command": name, "args": args or {}, **envelope})
        return id

    def call(self, name: str, args: dict[str, Any] | None = None, **envelope: Any) -> dict[str, Any]:
        """Send a command and give its reply, which must be the next frame."""
        id = self.request(name, args, **envelope)
        reply = self.receive()
        assert reply["id"] == id
        return reply

    def receive(self, patience: float = PATIENCE) -> dict[str, Any]:
        """The next frame."""
        return json.loads(self.receive_payload(patience))

    def receive_payload(self, patience: float = PATIENCE) -> bytes:
        """The next frame's payload as it came."""
        head = self._read(4, patience)
        return self._read(int.from_bytes(head, "big"), patience)

    def receive_all(self, count: int) -> dict[Any, dict[str, Any]]:
        """The next `count` replies by their id."""
        return {reply["id"]: reply for reply in (self.receive() for _ in range(count))}

    def idle(self, seconds: float = 0) -> bool:
        """Whether nothing that it has sent is still to be read, nor comes for so long."""
        return not self._bytes and not select.select([self.process.stdout], [], [], seconds)[0]

    def _read(self, count: int, patience: float) -> bytes:
        assert self.process.stdout is not None
        end = time.monotonic() + patience
        while len(self._bytes) < count:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no frame within {patience} s"
            data = os.read(self.process.stdout.fileno(), 1 << 20)
            assert data, f"the peer closed its stdout, exit {self.process.poll()}"
            self._bytes += data
        data = bytes(self._bytes[:count])
        del self._bytes[:count]
        return data

    def finish(self, patience: float = PATIENCE) -> tuple[int, bytes, str]:
        """Close stdin; give the exit code, what was still on stdout, and stderr."""
        out, err = self.process.communicate(timeout=patience)
        return self.process.returncode, bytes(self._bytes) + out, err.decode()

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)


def until(there: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What `there` gives once it gives something."""
    end = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.002)
    return found


def payloads(data: bytes) -> list[dict[str, Any]]:
    """The messages in a byte string of whole frames."""
    found = []
    while data:
        length = int.from_bytes(data[:4], "big")
        assert len(data) >= 4 + length, "the last frame is not whole"
        found.append(json.loads(data[4 : 4 + length]))
        data = data[4 + length :]
    return found


def contains(got: Any, wanted: Any) -> bool:
    """Whether `got` has all that `wanted` has, objects compared key by key."""
    if isinstance(wanted, dict):
        return isinstance(got, dict) and all(key in got and contains(got[key], wanted[key]) for key in wanted)
    return type(got) is type(wanted) and got == wanted


def vectors(name: str) -> list[dict[str, Any]]:
    """`tests/vectors/NAME.json`, which the Elixir side's tests read too."""
    return json.loads((ROOT / "tests" / "vectors" / f"{name}.json").read_text())


def vector_payload(vector: dict[str, Any]) -> bytes:
    """The bytes of a malformed vector: `payload` or `base64`, then `repeat`, then `then`."""
    import base64

    if "base64" in vector:
        return base64.b64decode(vector["base64"])
    text, times = vector.get("repeat", ["", 0])
    return (vector.get("payload", "") + text * times + vector.get("then", "")).encode()
