"""`make fuzz`: a real peer gets mutated frames, hundreds in flight, and each reply is held to the protocol.

    python tests/support/fuzz.py [COUNT] [--seed N]     COUNT mutated frames, 100,000 if not given
    python tests/support/fuzz.py --frame BASE64         that one frame, to a peer of its own; prints the reply

`mutations` makes the frames, `expected` has the replies that they should get. The outer length is always right, except
in the last packet, which the end of input cuts short. Pings between the frames narrow down which one caused a silence.
"""

from __future__ import annotations

import argparse
import base64
import collections
import json
import os
import random
import re
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
from expected import LIMIT, Failure, Key, Owed, Undecided, owed, read_reply
from mutations import ECHO, INPUTS, PROGRAMS, Frames
from peer import PATIENCE, Peer, frame

# Replies owed at most before more is sent.
WINDOW = 400
# After so many frames comes a ping, before which all that is answered at once must have been, and the programs are made
# again, as mutated cleanups remove them.
PING_EVERY = 100
# After so many frames all replies are awaited and the peer is looked at.
LOOK_EVERY = 2000
# What the peer may grow by from its second quarter to its last; of each the least counts, as a large frame may be held
# for 15,000 others. In 100,000 frames it is some 20 MiB, in 270,000 some 6: it settles after 60,000.
MAY_GROW = 32 << 20
# Threads that may be added as they are needed: up to 64 for DSPy's short steps, up to 64 for modules that are sync.
MORE_THREADS = 128
# No mutated LM options may reach a network: what tries to finds a closed port of this machine.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
ENV = {"DSPY_BRIDGE_LM": ECHO, **dict.fromkeys(PROXIES, "http://127.0.0.1:9")}


class Exchange:
    """Frames out, replies in, each held against what its frame is owed."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        assert peer.process.stdin is not None and peer.process.stdout is not None and peer.process.stderr is not None
        self._out, self._in = peer.process.stdin.fileno(), peer.process.stdout.fileno()
        os.set_blocking(self._out, False)
        self._unsent = bytearray()
        self._received = bytearray()
        self._owed: dict[Key, collections.deque[Owed]] = collections.defaultdict(collections.deque)
        self._at_once: collections.deque[Owed] = collections.deque()
        self._cancels: set[Key] = set()
        self._cancelled: collections.deque[bytes] = collections.deque(maxlen=PING_EVERY)
        self.open = 0
        self.sent = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.log = bytearray()
        self._logging = threading.Thread(target=self._read_log, args=(peer.process.stderr,), daemon=True)
        self._logging.start()

    def send(self, payload: bytes) -> Owed | None:
        """Send a frame unless its id is that of one in flight: then their replies could not be told apart."""
        try:
            due = owed(payload)
        except Undecided:
            return None
        if due is None:
            message = json.loads(payload)
            self._cancels.add((type(message["cancel"]), message["cancel"]))
            self._cancelled.append(payload)
            self.kinds["no reply: cancel"] += 1
        else:
            alike = [other for key in due.keys for other in self._owed.get(key, ()) if not other.paid]
            if (not due.at_once and alike) or any(not other.at_once for other in alike):
                return None
            for key in due.keys:
                self._owed[key].append(due)
            if due.at_once:
                self._at_once.append(due)
            self.open += 1
        self._unsent += frame(payload)
        self.sent += 1
        return due

    def request(self, id: str, command: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
        """A good request and its reply, whatever else is in flight."""
        due = self.send(json.dumps({"id": id, "command": command, "args": args or {}}).encode())
        assert due is not None
        self._last: dict[str, Any] = {}
        self.until(lambda: due.paid)
        return self._last

    def until(self, reached: Callable[[], bool]) -> None:
        """Write and read until then. Raises `Failure`."""
        while not reached():
            ready, writable, _ = select.select([self._in], [self._out] if self._unsent else [], [], PATIENCE)
            if not ready and not writable:
                raise Failure(f"nothing came for {PATIENCE} s with {self.open} replies owed", *self._suspects())
            if writable:
                try:
                    del self._unsent[: os.write(self._out, memoryview(self._unsent)[: 1 << 18].tobytes())]
                except BrokenPipeError:
                    raise Failure("the peer closed its input", *self._suspects()) from None
            if ready:
                data = os.read(self._in, 1 << 20)
                if not data:
                    raise Failure(f"the peer is gone, exit {self._peer.process.wait(PATIENCE)}", *self._suspects())
                self._received += data
                self._take()

    def end(self, cut_short: bytes) -> None:
        """End of input inside a packet: the peer drops it, says so and exits with 0."""
        stdin = self._peer.process.stdin
        assert stdin is not None
        os.set_blocking(self._out, True)
        os.write(self._out, cut_short)
        stdin.close()
        code = self._peer.process.wait(PATIENCE)
        self._logging.join(PATIENCE)
        rest = os.read(self._in, 1 << 20)
        if code != 0 or rest or self._received or b"inside a frame" not in self.log:
            raise Failure(f"at the end of input: exit {code}, then {rest[:500]!r}, log {bytes(self.log[-500:])!r}")

    def _take(self) -> None:
        at = 0
        while len(self._received) >= at + 4:
            stop = at + 4 + int.from_bytes(self._received[at : at + 4], "big")
            if len(self._received) < stop:
                break
            self._pay(bytes(self._received[at + 4 : stop]))
            at = stop
        del self._received[:at]

    def _pay(self, payload: bytes) -> None:
        try:
            reply = read_reply(payload)
        except Failure as failure:
            match = re.match(rb'\{"id":(-?[0-9]+|"(?:[^"\\]|\\.)*")', payload)
            like = self._unpaid((int if match[1][:1] != b'"' else str, json.loads(match[1]))) if match else []
            raise Failure(str(failure), *([due.payload for due in like] or self._suspects())) from None
        key = (type(reply["id"]), reply["id"])
        candidates = self._unpaid(key)
        if "success" not in reply:
            self._interim(reply, payload, candidates)
            return
        due = next((due for due in candidates if due.wrong(reply) is None), None)
        if due is None:
            why = candidates[0].wrong(reply) if candidates else "nobody asked for this, or it came twice"
            raise Failure(f"{why}: {payload[:1000]!r}", *[due.payload for due in candidates])
        if reply.get("error_type") == "cancelled" and key not in self._cancels:
            raise Failure(f"cancelled by nobody: {payload[:500]!r}", due.payload)
        if len(payload) > max(LIMIT, len(due.payload) + 300):
            raise Failure(f"a reply of {len(payload)} bytes is past the limit", due.payload)
        due.paid = True
        self.open -= 1
        self._last = reply
        end = "success" if reply["success"] else reply["error_type"]
        self.kinds[f"{end}: {due.command}" if end == "success" else end] += 1
        while self._at_once and self._at_once[0].paid:
            self._at_once.popleft()

    def _interim(self, message: dict[str, Any], payload: bytes, candidates: list[Owed]) -> None:
        """What comes before a reply: never after it, and a stream only where it was asked for. Tools are answered."""
        running = [due for due in candidates if due.command == "execute_program"]
        if not running or ("stream" in message and not any(due.stream for due in running)):
            raise Failure(f"nobody asked for this, or it came too late: {payload[:1000]!r}")
        self.kinds["stream" if "stream" in message else "tool_call"] += 1
        if "tool_call" in message:
            call_id = message["tool_call"]["call_id"]
            results: list[dict[str, Any]] = [
                {"success": True, "result": {"found": [call_id, None, "ž🐎"]}},
                {"success": True, "result": 0.5},
                {"success": False, "error": "no\nluck"},
                {"success": "perhaps"},
            ]
            result = {"tool_result": {"call_id": call_id, **results[call_id % len(results)]}}
            self._unsent += frame(json.dumps(result).encode())

    def _unpaid(self, key: Key) -> list[Owed]:
        waiting = self._owed.get(key)
        if waiting is None:
            return []
        while waiting and waiting[0].paid:
            waiting.popleft()
        if not waiting:
            del self._owed[key]
        return [due for due in waiting if not due.paid]

    def unanswered(self, before: Owed) -> list[Owed]:
        """What was answered at once, says the protocol, and was not, although what came after it was."""
        late = []
        for due in self._at_once:
            if due is before:
                break
            if not due.paid:
                late.append(due)
        return late

    def _suspects(self) -> list[bytes]:
        late = {id(due): due for waiting in self._owed.values() for due in waiting if not due.paid}
        return [due.payload for due in late.values()] + list(self._cancelled)

    def _read_log(self, stream: Any) -> None:
        while data := os.read(stream.fileno(), 1 << 16):
            self.log += data


@dataclass
class Summary:
    """What a run was like."""

    seed: int
    sent: int
    seconds: float
    kinds: collections.Counter[str]
    rss: tuple[int, int]
    log_lines: int

    def __str__(self) -> str:
        before, after = (round(rss / (1 << 20), 1) for rss in self.rss)
        lines = [f"{count:8} {kind}" for kind, count in self.kinds.most_common()]
        lines.append(f"seed {self.seed}: {self.sent} frames in {self.seconds:.1f} s, {self.sent / self.seconds:.0f}/s")
        lines.append(f"memory {before} MiB in the second quarter, {after} in the last; {self.log_lines} lines of log")
        return "\n".join(lines)


def run(count: int, seed: int) -> Summary:
    """Send `count` mutated frames to a peer of their own. Raises `Failure`."""
    began = time.monotonic()
    frames = Frames(seed)
    with Peer("--max-frame-bytes", str(LIMIT), env=ENV) as peer:
        exchange = Exchange(peer)
        process = psutil.Process(peer.process.pid)
        sizes: list[tuple[int, int, int]] = []
        _warm_up(exchange)
        for number in range(count):
            if number % PING_EVERY == 0:
                _ping(exchange, number)
            if number % LOOK_EVERY == 0:
                _look(exchange, peer, number)
                sizes.append(_sizes(exchange, process, number))
            exchange.send(frames.next())
            if exchange.open >= WINDOW or len(exchange._unsent) > 1 << 18:
                exchange.until(lambda: exchange.open < WINDOW // 2 and not exchange._unsent)
        _look(exchange, peer, count)
        sizes.append(_sizes(exchange, process, count))
        quarter = max(1, len(sizes) // 4)
        first, last = (tuple(map(min, *part, part[0])) for part in (sizes[quarter : 2 * quarter], sizes[-quarter:]))
        if last[0] > first[0] + MAY_GROW or last[1] > first[1] or last[2] > first[2] + MORE_THREADS:
            raise Failure(f"memory, descriptors, threads: {first} in the second quarter, {last} in the last")
        exchange.end(frame(b'{"id":"cut short","command":"ping"}')[:-5])
        if b"Traceback" in exchange.log:
            raise Failure(f"a traceback in the log: {exchange.log[-3000:].decode()}")
    seconds = time.monotonic() - began
    return Summary(seed, exchange.sent, seconds, exchange.kinds, (first[0], last[0]), exchange.log.count(b"\n"))


def _warm_up(exchange: Exchange) -> None:
    """Have all imported that any frame may bring in: an LM that is not built in is 150 MB of LiteLLM."""
    exchange.request("warm up 1", "create_program", {"id": "qa", **PROGRAMS["qa"]})
    ask = {"program_id": "qa", "inputs": INPUTS["qa"], "lm": {"model": "nobody/nothing"}}
    exchange.request("warm up 2", "execute_program", ask)


def _ping(exchange: Exchange, number: int) -> None:
    ping = exchange.send(json.dumps({"id": f"ping {number}", "command": "ping"}).encode())
    assert ping is not None
    exchange.until(lambda: ping.paid)
    if late := exchange.unanswered(ping):
        raise Failure("a later ping was answered, but not this", *[due.payload for due in late])
    for id, program in PROGRAMS.items():
        create = {"id": f"create {id} {number}", "command": "create_program", "args": {"id": id, **program}}
        due = exchange.send(json.dumps(create).encode())
        assert due is not None
        due.ends = frozenset(("success",))


def _look(exchange: Exchange, peer: Peer, number: int) -> None:
    """All replies are in; the peer is the same and has nothing to do."""
    exchange.until(lambda: exchange.open == 0 and not exchange._unsent)
    end = time.monotonic() + PATIENCE
    # What was cancelled has been answered, and may take another moment to end.
    for attempt in range(1_000_000):
        stats = exchange.request(f"look {number} {attempt}", "get_stats")["result"]
        if (stats["in_flight"], stats["queued"]) == (0, 0):
            break
        if time.monotonic() > end:
            raise Failure(f"all has been answered, but {stats['in_flight']} run and {stats['queued']} wait")
    if stats["pid"] != peer.process.pid:
        raise Failure("another process answers")
    if b"Traceback" in exchange.log:
        raise Failure(f"a traceback in the log: {exchange.log[-3000:].decode()}")
    exchange.request(f"clean {number}", "cleanup")


def _sizes(exchange: Exchange, process: psutil.Process, number: int) -> tuple[int, int, int]:
    """Bytes of memory, and how many descriptors and threads."""
    stats = exchange.request(f"sizes {number}", "get_stats")["result"]
    return stats["memory_usage"]["rss"], process.num_fds(), process.num_threads()


def alone(payload: bytes) -> str | None:
    """What goes wrong with that frame on a peer of its own; None if nothing does."""
    with Peer("--max-frame-bytes", str(LIMIT), env=ENV) as peer:
        exchange = Exchange(peer)
        try:
            _ping(exchange, 0)
            exchange.send(payload)
            _look(exchange, peer, 1)
        except Failure as failure:
            return str(failure)
    return None


def main() -> int:
    """The command line. Returns the exit code: 1 for a failure."""
    parser = argparse.ArgumentParser(description="Send mutated frames to a real peer and hold it to the protocol.")
    parser.add_argument("count", nargs="?", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--frame", type=base64.b64decode, metavar="BASE64", help="only this frame")
    chosen = parser.parse_args()
    if chosen.frame is not None:
        why = alone(chosen.frame)
        _say(f"{chosen.frame[:2000]!r}\n{why or 'answered as it should be'}")
        return 0 if why is None else 1
    seed = random.randrange(1 << 32) if chosen.seed is None else chosen.seed
    try:
        _say(str(run(chosen.count, seed)))
    except Failure as failure:
        _say(f"seed {seed}: {failure}")
        # More than one if a silence or a crash does not show which it was: each is tried on a peer of its own.
        guilty = failure.suspects if len(failure.suspects) == 1 else [p for p in failure.suspects[-50:] if alone(p)]
        for payload in guilty or failure.suspects[-50:]:
            _say(f"  --frame {base64.b64encode(payload).decode()}")
        return 1
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
