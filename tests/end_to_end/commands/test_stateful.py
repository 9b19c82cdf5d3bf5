"""The peer against a model: commands, cancels, deadlines and junk in any order, and the expected replies.

One peer serves all runs. Its LM is a loopback server that holds its answers back while a run wants calls in flight.
Frames go out whole, in pieces or many at a time, and nothing sleeps: what must have happened by now is known from a
later reply, and a deadline is certain to strike where the LM is held.

`STATEFUL_EXAMPLES=1000 pytest tests/end_to_end/commands/test_stateful.py` tries more, and others each time.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import lm_env
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from lm_server import Answer, LMServer, chat
from peer import PATIENCE, Peer, frame, vector_payload, vectors

META = {
    "duration_ms", "queue_ms", "wait_ms", "lm_usage", "lm_calls", "cache_hits", "finish_reasons", "fallbacks",
    "cost_usd",
}  # fmt: skip
EXAMPLES = int(os.environ.get("STATEFUL_EXAMPLES", "0"))
# Low, so that runs reach them.
LIMIT = 3000
RUNNING, WAITING = 3, 4
PROGRAMS = ("a", "ž 🐎")
CLEANUPS = (None, [], ["nobody"], ["a"], ["a", "nobody", "a"], ["ž 🐎"], ["nobody", "nobody"], [""])
# Shorter than the tests' patience: a lost reply is waited for anew with each example that is tried for it.
WAIT = 10.0

# Of a definition that cannot be loaded: its arguments and the type of its error.
BAD: list[tuple[dict[str, Any], str]] = [
    ({"signature": "question -> answer: nope"}, "invalid_args"),
    ({"signature": "question -> answer", "program_type": "nope"}, "invalid_args"),
    ({"signature": "question -> answer", "program_type": "os:path"}, "not_allowed"),
    ({"signature": "question -> answer", "adapter": "yaml"}, "invalid_args"),
    ({"signature": {"inputs": [], "outputs": []}}, "invalid_args"),
    ({"signature": "question -> answer", "lm": {"model": ""}}, "invalid_args"),
]
# Requests that are answered at once, with an error of this type.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("create_program", {"id": "a"}, "invalid_args"),
    ("create_program", {"id": 5, "signature": "q -> a"}, "invalid_args"),
    ("create_program", {"id": "a", "signature": "q -> a", "signatur": 1}, "invalid_args"),
    ("execute_program", {"program_id": "a"}, "invalid_args"),
    ("execute_program", {"program_id": "a", "inputs": {}, "lm": []}, "invalid_args"),
    ("list_programs", {"details": 1}, "invalid_args"),
    ("cleanup", {"program_ids": [1]}, "invalid_args"),
    ("optimize", {"program_id": "a"}, "unknown_command"),
]
# By name, what is answered under which id with which error.
JUNK: dict[str, tuple[bytes, Any, str]] = {
    **{v["name"]: (vector_payload(v), v["id"], v["error_type"]) for v in vectors("malformed")},
    "a term": (b"\x83t\x00\x00\x00\x01m\x00\x00\x00\x02id", None, "invalid_json"),
    "cancel null": (b'{"cancel":null}', None, "invalid_request"),
    "cancel a float": (b'{"cancel":1.5}', None, "invalid_request"),
    "too large": (b"\x00" * (LIMIT + 1), None, "frame_too_large"),
}
JUNK_IDS = {id for _, id, _ in JUNK.values()}
PINGS: list[Callable[[str], str]] = [
    '{{"id":{},"command":"ping","args":{{}},"timestamp":"2026-01-01T00:00:00Z"}}'.format,
    '{{"id":{},"timeout_ms":5000,"command":"ping","args":{{}},"timestamp":"2026-01-01T00:00:00Z"}}'.format,
    '{{"command":"ping","id":{}}}'.format,
    ' {{ "args" : {{"id": 0}}, "id":\t{} ,\r\n"command": "\\u0070ing", "command": "ping" }} '.format,
    '{{"id":0,"id":{},"command":"ping","args":null,"timeout_ms":1e-9,"stream":true}}'.format,
]

# An id with its type: 1 and "1" are two.
Key = tuple[type, Any]


@dataclass(eq=False)
class Version:
    """One definition of a program id. `sure`: its create cannot be stopped; `created`: its reply's result, if any."""

    number: int
    id: str
    args: dict[str, Any]
    outputs: tuple[str, ...] = ()
    sure: bool = True
    created: bool | None = None

    @property
    def bad(self) -> bool:
        return not self.outputs


@dataclass(eq=False)
class Ending:
    """One possible end of a request: a valid result, or an error of this type and, if given, this text."""

    error_type: str | None = None
    text: str | None = None
    fits: Callable[[Any], bool] = lambda _result: True

    def admits(self, reply: dict[str, Any]) -> bool:
        if self.error_type is None:
            return reply["success"] and self.fits(reply["result"])
        if reply["success"] or reply["error_type"] != self.error_type:
            return False
        return self.text is None or reply["error"] == self.text


@dataclass(eq=False)
class Owed:
    """A request's one reply. `at_once`: before any to what was sent later.

    `held`: the LM holds it for certain; `once_let_go`: how it may end, too, if the LM is let go before it is received.
    For a creation: `version`. For a call of a program: `program`, and `if_stopped`: its other possible ending, if a
    creation is stopped.
    """

    id: Any
    endings: list[Ending]
    meta: bool = False
    at_once: bool = True
    limited: bool = False
    held: bool = False
    once_let_go: list[Ending] = field(default_factory=list)
    version: Version | None = None
    program: str | None = None
    if_stopped: list[Ending] = field(default_factory=list)
    # In the order in which they were sent; and whether it has no place yet, so that it leaves none behind.
    number: int = 0
    waiting: bool = False

    @property
    def key(self) -> Key:
        return type(self.id), self.id

    def admits(self, reply: dict[str, Any]) -> bool:
        return any(ending.admits(reply) for ending in self.endings)


def success(result: Any) -> Ending:
    return Ending(fits=lambda given: given == result)


CANCELLED, LATE, OVERLOADED = Ending("cancelled"), Ending("timeout"), Ending("overloaded")


def answer(request: dict[str, Any]) -> Answer:
    """The LM's answer: the question in each requested field, or the failure that the question asks for."""
    last = request["messages"][-1]["content"]
    question = re.findall(r"(?:ok|refuse|garble) \d+", last)[-1]
    if question.startswith("refuse"):
        return 400, {"error": {"message": "not this one", "type": "invalid_request_error"}}
    fields = re.findall(r"`\[\[ ## (\w+) ## \]\]`", last)
    if question.startswith("garble"):
        return "no such format"
    return chat(**{name: f"{name} of {question}" for name in fields if name != "completed"})


class Session:
    """The LM, and a peer for all runs; a new peer after a run that failed."""

    def __init__(self) -> None:
        self.lm = LMServer(answer)
        self.runs = itertools.count(1)
        self.sound = False
        self._peer: Peer | None = None

    @property
    def peer(self) -> Peer:
        if self._peer is None or not self.sound:
            self.stop()
            flags = ("--max-frame-bytes", LIMIT, "--max-in-flight", RUNNING, "--max-queue", WAITING)
            self._peer = Peer(*map(str, flags), "--log-level", "error", env=lm_env(self.lm))
            self.sound = True
            # DSPy is imported, the LM's client made and all is warm: from here on replies are a matter of milliseconds.
            assert self._peer.call("create_program", {"id": "a", "signature": "question -> a"})["success"]
            ask = {"program_id": "a", "inputs": {"question": "ok 1"}}
            assert self._peer.call("execute_program", ask)["result"] == {"a": "a of ok 1"}
            assert self._peer.call("cleanup")["success"]
        return self._peer

    def stop(self) -> None:
        self.lm.gate.set()
        if self._peer is not None:
            self._peer.__exit__()


class Runs(RuleBasedStateMachine):
    """One run. Rules append frames to `unsent` and to what is owed; then all, a part or none of it is written."""

    session: Session

    def __init__(self) -> None:
        super().__init__()
        self.peer = self.session.peer
        self.lm = self.session.lm
        self.lm.gate.set()
        self.first = next(self.session.runs) * 1000
        self.count = 0
        self.unsent = b""
        self.owed: dict[Key, list[Owed]] = {}
        self.got: dict[Key, list[dict[str, Any]]] = {}
        self.versions: dict[str, list[Version]] = {}
        self.finished: list[Any] = []
        # Calls that were answered before they ended: they may still have their slots.
        self.lingering = 0
        # As the last get_stats reported.
        self.running = 0

    # What is sent.

    ids = st.sampled_from(("int", "int", "negative", "huge", "text", "digits", "unicode", "escapes", "again"))
    parts = st.sampled_from((1.0, 1.0, 1.0, 0.0, 0.1, 0.5, 0.9))
    deadlines = st.sampled_from((None, None, None, 60_000, 1e300, 2))
    metas = st.sampled_from((False, False, True))

    def new_id(self, kind: str) -> Any:
        """An unused id of any valid form; `again`: one of an answered request."""
        number = self.number()
        if kind == "again" and self.finished:
            return self.finished.pop()
        forms = {"negative": -number, "huge": 10**40 + number, "text": f"id-{number}", "digits": str(number)}
        forms |= {"unicode": f"žluť 🐎\u2028 {number}", "escapes": f'"\\/\n\x00\x7f{number}'}
        return forms.get(kind, number)

    def number(self) -> int:
        """Different in each run, but the same number of steps apart in equal runs."""
        self.count += 1
        return self.first + self.count

    def add(self, owed: Owed, payload: bytes) -> Owed:
        owed.number = self.number()
        self.unsent += frame(payload)
        self.owed.setdefault(owed.key, []).append(owed)
        return owed

    def request(self, owed: Owed, command: str, args: dict[str, Any] | None, timeout_ms: float | None = None) -> Owed:
        message: dict[str, Any] = {"id": owed.id, "command": command}
        if args is not None:
            message["args"] = args
        if timeout_ms is not None:
            message["timeout_ms"] = timeout_ms
        if owed.meta:
            message["meta"] = True
        return self.add(owed, json.dumps(message, ensure_ascii=bool(self.number() % 2)).encode())

    def write(self, part: float = 1.0) -> None:
        """Write so much of the unsent bytes; frames may be cut anywhere."""
        count = int(len(self.unsent) * part)
        if count:
            self.peer.send_bytes(self.unsent[:count])
            self.unsent = self.unsent[count:]

    # What comes back.

    def receive(self) -> None:
        """Receive one frame, which must be an expected one."""
        try:
            payload = self.peer.receive_payload(WAIT)
            reply = json.loads(payload)
        except (AssertionError, ValueError) as error:
            self.fail(f"{error}; owed: {[owed.id for each in self.owed.values() for owed in each]}")
        if not isinstance(reply, dict) or not payload.startswith(b'{"id":') or list(reply)[1:2] != ["success"]:
            self.fail(f"not the form of a reply: {payload!r}")
        key = (type(reply["id"]), reply["id"])
        owed, got = self.owed.get(key, []), self.got.setdefault(key, [])
        got.append(reply)
        pairs = fitting(owed, got)
        if pairs is None:
            wanted = [ending.error_type or "success" for one in owed for ending in one.endings]
            self.fail(f"expected {wanted}, got {payload!r}")
        if len(got) == len(owed):
            # Not before the last of equal ids is there is it known which reply was whose.
            del self.owed[key], self.got[key]
            for one, its in pairs:
                self.settle(one, its)

    def settle(self, owed: Owed, reply: dict[str, Any]) -> None:
        end = "result" if reply["success"] else "error"
        rest = [*(() if reply["success"] else ("error_type",)), *(("meta",) if owed.meta else ())]
        keys = [key for key in reply if key != "retryable"]
        if keys != ["id", "success", end, *rest] or ("retryable" in reply) != (reply.get("error_type") == "lm_error"):
            self.fail(f"other keys: {reply}")
        if owed.meta and reply["meta"].keys() != META:
            self.fail(f"another meta: {reply}")
        if owed.meta and owed.limited and reply["success"] and not reply["meta"]["lm_usage"]:
            self.fail(f"no usage: {reply}")
        if owed.version is not None:
            owed.version.created = reply["success"]
        if owed.limited and not owed.waiting and reply.get("error_type") in ("timeout", "cancelled"):
            self.lingering += 1
        if owed.id not in JUNK_IDS and owed.id not in self.finished:
            self.finished.append(owed.id)

    def wait_for(self, owed: Owed) -> None:
        while owed in self.owed.get(owed.key, ()):
            self.receive()

    def check(self, good: bool, why: str) -> None:
        if not good:
            self.fail(why)

    def fail(self, why: str) -> Any:
        """This peer is not used again."""
        self.session.sound = False
        raise AssertionError(why)

    # What the programs are.

    def meanings(self, id: str) -> list[Version | None]:
        """The versions that a run sent now may find under `id`; None: no program."""
        found: list[Version | None] = []
        for version in reversed(self.versions.get(id, [])):
            if version.bad or version.created is False:
                continue
            found.append(version)
            if version.sure or version.created:
                return found
        return [*found, None]

    def listed(self, id: str) -> list[Version | None]:
        """The versions that a list sent now may show for `id`: answered ones, or those answered meanwhile."""
        versions = self.versions.get(id, [])
        answered = [version for version in versions if version.created]
        since = versions[versions.index(answered[-1]) + 1 :] if answered else versions
        open = [version for version in since if version.created is None and not version.bad]
        return [*open, answered[-1] if answered else None]

    def places(self, owed: list[Owed]) -> int:
        return sum(one.limited for one in owed)

    def all_owed(self) -> list[Owed]:
        return [one for each in self.owed.values() for one in each]

    # The rules.

    @initialize(programs=st.sampled_from(((), PROGRAMS, PROGRAMS[::-1], PROGRAMS[:1])), hold=st.booleans())
    def begin(self, programs: tuple[str, ...], hold: bool) -> None:
        """Nothing is left of the earlier run."""
        self.ask_list(details=False, some=None, kind="int", part=1.0)
        self.barrier()
        for id in programs:
            self.create(id, False, "int", False, None, 1.0)
        if hold:
            self.hold_the_lm()

    @rule(which=st.sampled_from(PINGS), kind=ids, part=parts)
    def ping(self, which: Callable[[str], str], kind: str, part: float) -> None:
        owed = Owed(self.new_id(kind), [Ending(fits=lambda result: result.keys() == {"status", "timestamp"})])
        self.add(owed, which(json.dumps(owed.id, ensure_ascii=kind == "escapes")).encode())
        self.write(part)

    @rule(some=st.lists(st.sampled_from(sorted(JUNK)), min_size=1, max_size=5), part=parts)
    def junk(self, some: list[str], part: float) -> None:
        for payload, id, error_type in (JUNK[name] for name in some):
            too_large = len(payload) > LIMIT
            ending = Ending("frame_too_large" if too_large else error_type)
            self.add(Owed(None if too_large else id, [ending]), payload)
        self.write(part)

    @rule(wrong=st.sampled_from(WRONG), kind=ids, meta=metas, timeout=deadlines, part=parts)
    def wrong_request(
        self, wrong: tuple[str, dict[str, Any], str], kind: str, meta: bool, timeout: float | None, part: float
    ) -> None:
        command, args, error_type = wrong
        text = f"Unknown command: {command}" if error_type == "unknown_command" else None
        self.request(Owed(self.new_id(kind), [Ending(error_type, text)], meta), command, args, timeout)
        self.write(part)

    @rule(id=st.sampled_from(PROGRAMS), chain=st.booleans(), kind=ids, meta=metas, timeout=deadlines, part=parts)
    def create(self, id: str, chain: bool, kind: str, meta: bool, timeout: float | None, part: float) -> None:
        number = self.number()
        args: dict[str, Any] = {"id": id, "signature": f"question -> a{number}"}
        if chain:
            args["program_type"] = "chain_of_thought"
        version = Version(number, id, args, ("reasoning", f"a{number}") if chain else (f"a{number}",))
        self.send_create(version, [success({"program_id": id, "status": "created"})], kind, meta, timeout, part)

    @rule(id=st.sampled_from(PROGRAMS), bad=st.sampled_from(BAD), kind=ids, meta=metas, timeout=deadlines, part=parts)
    def create_bad(
        self, id: str, bad: tuple[dict[str, Any], str], kind: str, meta: bool, timeout: float | None, part: float
    ) -> None:
        args, error_type = bad
        version = Version(self.number(), id, {"id": id, **args})
        self.send_create(version, [Ending(error_type)], kind, meta, timeout, part)

    def send_create(
        self, version: Version, endings: list[Ending], kind: str, meta: bool, timeout: float | None, part: float
    ) -> None:
        if timeout == 2:
            endings.append(LATE)
            version.sure = False
        owed = Owed(self.new_id(kind), endings, meta, at_once=False, version=version)
        self.versions.setdefault(version.id, []).append(version)
        self.request(owed, "create_program", version.args, timeout)
        self.write(part)

    @rule(
        id=st.sampled_from((*PROGRAMS, "nobody")),
        question=st.sampled_from(("ok", "ok", "ok", "refuse", "garble", None)),
        kind=ids,
        meta=metas,
        timeout=deadlines,
        part=parts,
    )
    def execute(self, id: str, question: str | None, kind: str, meta: bool, timeout: float | None, part: float) -> None:
        owed = self.send_execute(id, question, self.new_id(kind), meta, timeout)
        if owed.held and timeout == 2:
            # The LM says nothing meanwhile.
            owed.endings = [LATE]
            self.note_whether_waiting(owed)
            self.write()
            self.wait_for(owed)
        self.write(part)

    @rule(id=st.sampled_from(PROGRAMS), count=st.integers(2, RUNNING + WAITING + 2), kind=ids, part=parts)
    def execute_many(self, id: str, count: int, kind: str, part: float) -> None:
        for _ in range(count):
            self.send_execute(id, "ok", self.new_id(kind), False, None)
        self.write(part)

    @rule(id=st.sampled_from(PROGRAMS), kind=ids, part=parts)
    def execute_twice_under_one_id(self, id: str, kind: str, part: float) -> None:
        """Against the protocol, but each gets its reply."""
        same = self.new_id(kind)
        for _ in range(2):
            self.send_execute(id, "ok", same, False, None)
        self.write(part)

    def send_execute(self, id: str, question: str | None, its: Any, meta: bool, timeout: float | None) -> Owed:
        meanings = self.meanings(id)
        asked = f"{question} {self.number()}"
        endings = [execute_ending(meaning, id, question, asked) for meaning in meanings]
        others = self.all_owed()
        must_wait = sum(one.held for one in others) >= RUNNING + WAITING
        # No program under the id: answered by the reading thread, before any limit.
        nothing = meanings == [None] and not any(v.created is None for v in self.versions.get(id, ()))
        certain = None not in meanings and question is not None and not self.lm.gate.is_set()
        if timeout == 2 and not nothing:
            endings.append(LATE)
        if not nothing and self.places(others) + self.lingering >= RUNNING + WAITING:
            endings.append(OVERLOADED)
            certain = False
        owed = Owed(its, endings, meta, at_once=nothing, limited=not nothing, held=certain)
        owed.program = id
        older = [*(version for version in self.versions.get(id, []) if not version.bad), None]
        owed.if_stopped = [execute_ending(version, id, question, asked) for version in older]
        if must_wait and OVERLOADED in endings and None not in meanings:
            owed.endings, owed.once_let_go = [OVERLOADED], endings
        inputs = {"question": asked} if question else {"qestion": asked}
        return self.request(owed, "execute_program", {"program_id": id, "inputs": inputs}, timeout)

    @rule(which=st.integers(0, 9), again=st.booleans(), part=parts)
    def cancel_in_flight(self, which: int, again: bool, part: float) -> None:
        # What is in flight depends on the peer's speed, so nothing may be drawn from it.
        if not self.owed:
            return
        # Mostly what a cancel can stop.
        slow = [key for key, each in self.owed.items() if not all(owed.at_once for owed in each)]
        some = slow if slow and which else list(self.owed)
        key = some[which % len(some)]
        self.unsent += frame(json.dumps({"cancel": key[1]}).encode()) * (1 + again)
        if key[1] is None:
            # Not an id: an error without one.
            for _ in range(1 + again):
                self.owed[key].append(Owed(None, [Ending("invalid_request")]))
            return
        each = self.owed[key]
        for owed in each:
            if not owed.at_once:
                owed.endings.append(CANCELLED)
            if owed.version is not None:
                self.unsettle(owed.version)
        if len(each) == 1 and each[0].held and not any(LATE in owed.endings for owed in each):
            # The LM says nothing meanwhile, so there is nothing else that it could end in.
            each[0].endings = [CANCELLED]
            self.note_whether_waiting(each[0])
            self.write()
            self.wait_for(each[0])
            # Nor is it counted any more.
            self.send_stats("int")
        for owed in each:
            owed.held = False
        self.write(part)

    def note_whether_waiting(self, owed: Owed) -> None:
        """Behind as many calls as may run, which do not end."""
        before = [one for one in self.all_owed() if one.limited and one.number < owed.number]
        owed.waiting = len(before) >= RUNNING and all(one.held for one in before)

    def unsettle(self, version: Version) -> None:
        """Its create may be stopped: then later runs may find the earlier program."""
        version.sure = False
        for owed in self.all_owed():
            if owed.program == version.id:
                owed.endings += owed.if_stopped
                owed.held = False

    @rule(kind=ids, part=parts)
    def cancel_what_is_not_in_flight(self, kind: str, part: float) -> None:
        """One that was answered or never existed: it has no effect."""
        self.unsent += frame(json.dumps({"cancel": self.new_id(kind), "timestamp": "x"}).encode())
        self.write(part)

    @rule(
        details=st.booleans(), some=st.none() | st.lists(st.sampled_from((*PROGRAMS, "nobody"))), kind=ids, part=parts
    )
    def ask_list(self, details: bool, some: list[str] | None, kind: str, part: float) -> None:
        wanted = {id: self.listed(id) for id in PROGRAMS if some is None or id in some}
        args = {name: value for name, value in (("details", details), ("program_ids", some)) if value is not None}
        owed = Owed(self.new_id(kind), [Ending(fits=lambda result: is_list(result, wanted, details))])
        self.request(owed, "list_programs", args)
        self.write(part)

    @rule(some=st.sampled_from(CLEANUPS), kind=ids, meta=metas, part=parts)
    def cleanup(self, some: list[str] | None, kind: str, meta: bool, part: float) -> None:
        least = most = 0
        for id in PROGRAMS if some is None else set(some):
            versions = [version for version in self.versions.pop(id, []) if version.created is not False]
            most += bool(versions)
            least += any(version.created or (version.sure and not version.bad) for version in versions)
        owed = Owed(
            self.new_id(kind),
            [
                Ending(
                    fits=lambda result: (
                        list(result) == ["status", "programs_removed"]
                        and result["status"] == "cleaned"
                        and least <= result["programs_removed"] <= most
                    )
                )
            ],
            meta,
        )
        self.request(owed, "cleanup", None if some is None else {"program_ids": some})
        self.write(part)

    @rule(kind=ids, part=parts)
    def ask_stats(self, kind: str, part: float) -> None:
        self.send_stats(kind)
        self.write(part)

    def send_stats(self, kind: str) -> Owed:
        pid, places = self.peer.process.pid, self.places(self.all_owed()) + self.lingering
        ids = [self.listed(id) for id in PROGRAMS]
        least, most = sum(None not in each for each in ids), sum(each != [None] for each in ids)

        def fits(result: dict[str, Any]) -> bool:
            running, waiting = self.running, _ = result["in_flight"], result["queued"]
            if running > RUNNING or waiting > WAITING or running + waiting > places:
                return False
            return result["pid"] == pid and least <= result["programs_count"] <= most

        return self.request(Owed(self.new_id(kind), [Ending(fits=fits)]), "get_stats", {})

    @rule()
    def hold_the_lm(self) -> None:
        self.lm.gate.clear()

    @rule()
    def let_the_lm_go(self) -> None:
        self.lm.gate.set()
        for owed in self.all_owed():
            owed.held = False
            owed.endings += owed.once_let_go

    @rule()
    def barrier(self) -> None:
        """Immediate replies come before that of a later ping."""
        self.ask_list(details=False, some=None, kind="int", part=0.0)
        before = [owed for owed in self.all_owed() if owed.at_once]
        ping = Owed(self.new_id("int"), [Ending()])
        self.request(ping, "ping", {})
        self.write()
        self.wait_for(ping)
        late = [owed.id for owed in before if owed in self.owed.get(owed.key, ())]
        self.check(not late, f"not answered before a later ping: {late}")

    @rule(hold=st.booleans())
    def all_is_answered(self, hold: bool = False) -> None:
        """When the LM answers, all requests end."""
        self.let_the_lm_go()
        self.write()
        while self.owed:
            self.receive()
        # What was answered early gives its place back soon after.
        self.ask_list(details=True, some=None, kind="int", part=0.0)
        self.running, end = 1, time.monotonic() + WAIT
        while self.running:
            self.check(time.monotonic() < end, f"all calls are answered, but {self.running} are still running")
            stats = self.send_stats("int")
            self.write()
            self.wait_for(stats)
        self.lingering = 0
        if hold:
            self.hold_the_lm()

    @invariant()
    def what_has_come_was_owed(self) -> None:
        assert self.peer.process.stdout is not None
        while self.peer._bytes or select.select([self.peer.process.stdout], [], [], 0)[0]:
            self.receive()

    def teardown(self) -> None:
        if not self.session.sound:
            return
        self.all_is_answered()
        # What the loop wrote more than it should would come before these.
        self.create("a", False, "int", False, None, 1.0)
        self.send_execute("a", "ok", self.new_id("int"), False, None)
        self.all_is_answered()
        self.cleanup(None, "int", False, 1.0)
        self.all_is_answered()
        self.check(not self.peer._bytes, "more came than was asked for")


def fitting(owed: list[Owed], replies: list[dict[str, Any]]) -> list[tuple[Owed, dict[str, Any]]] | None:
    """Each reply with a request that it may belong to, or None."""
    for some in itertools.permutations(owed, len(replies)):
        pairs = list(zip(some, replies, strict=True))
        if all(one.admits(reply) for one, reply in pairs):
            return pairs
    return None


def execute_ending(version: Version | None, id: str, question: str | None, asked: str) -> Ending:
    """The possible ends of a run that finds this version."""
    if version is None:
        return Ending("program_not_found", f"Program not found: {id}")
    if question is None:
        return Ending("invalid_args")
    if question == "refuse":
        return Ending("lm_error")
    if question == "garble":
        return Ending("output_invalid")
    return success({name: f"{name} of {asked}" for name in version.outputs})


def is_list(result: dict[str, Any], wanted: dict[str, list[Version | None]], details: bool) -> bool:
    """Whether exactly the expected programs are listed, oldest first."""
    ids = result["programs"]
    if len(set(ids)) != len(ids) or not set(ids) <= wanted.keys():
        return False
    if any(None not in versions and id not in ids for id, versions in wanted.items()):
        return False
    if details != ("details" in result):
        return False
    last = 0
    for place, id in enumerate(ids):
        shown = result["details"][place] if details else None
        numbers = [
            v.number for v in wanted[id] if v is not None and v.number > last and (shown is None or describes(shown, v))
        ]
        if not numbers:
            return False
        last = min(numbers)
    return True


def describes(shown: dict[str, Any], version: Version) -> bool:
    kind = version.args.get("program_type", "predict")
    same = (shown["id"], shown["signature"], shown["program_type"]) == (version.id, version.args["signature"], kind)
    return (
        same and shown["execution_count"] >= 0 and (shown["last_executed"] is None) == (shown["execution_count"] == 0)
    )


@pytest.mark.timeout(600 + 10 * EXAMPLES)
@pytest.mark.slow
def test_the_peer_does_what_its_model_says() -> None:
    session = Session()
    machine = type("Runs", (Runs,), {"session": session})
    chosen = settings(
        max_examples=EXAMPLES or 150,
        stateful_step_count=40,
        deadline=None,
        derandomize=not EXAMPLES,
        # Where a reply is lost, each example that is tried waits for it in vain: a short one is looked for on demand.
        phases=(Phase.generate, Phase.shrink) if EXAMPLES else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(machine, settings=chosen)
        code, rest, log = session.peer.finish(PATIENCE)
        assert (code, rest) == (0, b"") and "Traceback" not in log
    finally:
        session.stop()
        session.lm.stop()
