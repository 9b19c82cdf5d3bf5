"""erlport: terms to JSON and back, and the dispatcher behind `call` and `submit`. ErlPort is a stand-in.

What needs DSPy runs in processes of its own: `fakes/erlport_program.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fakes.erlport
import pytest
from fakes.erlport import erlang, erlterms
from fakes.erlport.erlterms import Atom, ImproperList, Opaque, decode, encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peer import ROOT

from dspy_bridge import erlport
from dspy_bridge.commands import handlers
from dspy_bridge.dispatch.call import Call
from dspy_bridge.wire import erlport_terms, messages

PID = Opaque(Opaque.PID, 1)
FAKES = ROOT / "tests" / "fakes"
SCENARIOS = re.findall(r"^def (\w+)\(\) -> None:", (FAKES / "erlport_program.py").read_text(), re.MULTILINE)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that ErlPort has just started."""
    for name in [name for name in os.environ if name.startswith("DSPY_BRIDGE_")]:
        monkeypatch.delenv(name)
    for name, module in (("erlport", fakes.erlport), ("erlport.erlterms", erlterms), ("erlport.erlang", erlang)):
        monkeypatch.setitem(sys.modules, name, module)
    erlport._peer.cache_clear()
    monkeypatch.setattr(erlang, "mailbox", queue.Queue())
    monkeypatch.setattr(erlang, "ended", [])


class Held:
    """Commands of the test's own.

    `echo`, `twice` and `later` (on the event loop) give their args, `hold` too once released; `ask` what a tool says.
    """

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.release = threading.Event()

    def table(self) -> dict[str, Any]:
        return {
            "echo": lambda args, call: args,
            "twice": lambda args, call: [args, args],
            "later": self._later,
            "hold": self._limited,
            "ask": self._ask,
        }

    async def _later(self, args: dict[str, Any], call: Call) -> Any:
        return args

    def _limited(self, args: dict[str, Any], call: Call) -> Any:
        call.limited = True
        return self._hold(args, call)

    async def _hold(self, args: dict[str, Any], call: Call) -> Any:
        self.started.release()
        assert await asyncio.to_thread(self.release.wait, 20)
        return args

    async def _ask(self, args: dict[str, Any], call: Call) -> Any:
        return await call.call_tool("search", {"text": "x"})


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    """The commands of `Held` in place of the six."""
    held = Held()
    monkeypatch.setattr(handlers.Commands, "table", lambda self: held.table())
    return held


def call(command: Any, args: Any = None) -> Any:
    """`python:call(…, call, [command, args])`, in Erlang's terms."""
    return encode(erlport.call(decode(command), decode({} if args is None else args)))


def submit_to(receiver: Any, ref: Any, command: Any, args: Any = None) -> Any:
    """`python:call(…, submit, [receiver, ref, command, args])`."""
    args = {} if args is None else args
    return encode(erlport.submit(decode(receiver), decode(ref), decode(command), decode(args)))


def submit(ref: Any, command: Any, args: Any = None) -> None:
    assert submit_to(PID, ref, command, args) == "ok"


def received() -> tuple[Any, Any]:
    """The next message's reference and map."""
    pid, (tag, ref, reply) = erlang.mailbox.get(timeout=20)
    assert pid == PID and tag == "dspy_reply"
    return ref, reply


# Terms are written as in the stand-in: a binary is bytes, an atom str.


@pytest.mark.parametrize(
    ("term", "value"),
    [
        (b"gr\xc3\xbc\xc3\x9fe", "grüße"),
        (b"", ""),
        (b"nil", "nil"),
        (b"undefined", "undefined"),
        ("nil", None),
        ("undefined", None),
        ("true", True),
        ("false", False),
        (b"true", "true"),
        ("grün", "grün"),
        ({"größe": "ÿ"}, {"größe": "ÿ"}),
        ("chain_of_thought", "chain_of_thought"),
        ("null", "null"),
        (0, 0),
        (1.5, 1.5),
        (-0.0, -0.0),
        (10**4299, 10**4299),
        ([], []),
        ([1, "true", "nil", [b"x"]], [1, True, None, ["x"]]),
        ([104, 105], [104, 105]),
        ({}, {}),
        ({"atom": 1, b"binary": 2, 3: 4, "nil": 5, "true": 6, "undefined": 7},
         {"atom": 1, "binary": 2, "3": 4, "nil": 5, "true": 6, "undefined": 7}),
        ({-1: {b"a": [{}]}}, {"-1": {"a": [{}]}}),
    ],
)  # fmt: skip
def test_what_arrives_is_read_as_its_sender_means_it(term: Any, value: Any) -> None:
    got = erlport_terms.from_term(decode(term))
    assert repr(got) == repr(value)


@pytest.mark.parametrize(
    ("term", "place", "why", "error_type"),
    [
        ({b"a": {"b": [1, (1, 2)]}}, "args.a.b[1]: ", "got tuple", "invalid_args"),
        ({b"a": [PID]}, "args.a[0]: ", "got OpaqueObject", "invalid_args"),
        ({b"a": b"\xff"}, "args.a: ", "UTF-8: invalid byte at 0", "invalid_json"),
        ({b"a": b"ab\xc3"}, "args.a: ", "UTF-8: invalid byte at 2", "invalid_json"),
        ({b"a": {b"\xff": 1}}, "args.a: ", "UTF-8", "invalid_json"),
        ({b"a": {1.5: 1}}, "args.a: ", "keys that are binaries, atoms or integers, got float", "invalid_args"),
        ({b"a": {(1,): 1}}, "args.a: ", "keys that are binaries, atoms or integers, got tuple", "invalid_args"),
        ({b"a": 10**4300}, "args.a: ", "at most 4300 digits", "invalid_json"),
        ({b"a": -(10**4300)}, "args.a: ", "at most 4300 digits", "invalid_json"),
        ({10**4300: 1}, "args: ", "at most 4300 digits", "invalid_json"),
        ((), "args: ", "got tuple", "invalid_args"),
        (PID, "args: ", "OpaqueObject", "invalid_args"),
    ],
)
def test_what_has_no_json_form_is_refused_with_its_place(
    held: Held, term: Any, place: str, why: str, error_type: str
) -> None:
    reply = call(b"echo", term)
    assert reply[b"success"] == "false" and reply[b"error_type"] == error_type.encode()
    text = reply[b"error"].decode()
    assert text.startswith(place) and why in text


def nested(depth: int) -> Any:
    term: Any = 1
    for _ in range(depth - 1):
        term = [term]
    return {b"a": term}


def test_terms_nested_as_deep_as_the_port_takes_come_through_and_deeper_ones_are_refused(held: Held) -> None:
    """Nothing becomes text on its way for being deep, and the place stays short."""
    for levels, read in ((erlport_terms.MAX_LEVELS, True), (erlport_terms.MAX_LEVELS + 1, False)):
        args = b'{"a":' + b"[" * (levels - 1) + b"1" + b"]" * (levels - 1) + b"}"
        with contextlib.nullcontext() if read else pytest.raises(messages.NotJSON):
            messages.decode(b'{"id":1,"command":"echo","args":' + args + b"}")
    assert call(b"echo", nested(erlport_terms.MAX_LEVELS))[b"result"] == nested(erlport_terms.MAX_LEVELS)
    reply = call(b"echo", nested(erlport_terms.MAX_LEVELS + 1))
    assert reply[b"error_type"] == b"invalid_json" and b"nested deeper than 199 levels" in reply[b"error"]
    assert reply[b"error"].startswith(b"args.a[0][0]")


@pytest.mark.parametrize(
    ("value", "term"),
    [
        ([float("nan"), float("inf")], ["nil", "nil"]),
        (float("-inf"), "nil"),
        ("\ud800", b"?"),
        ({"\ud800": [1.5]}, {b"?": [1.5]}),
    ],
)
def test_what_has_no_form_in_erlang_or_json_is_the_nearest_that_has(value: Any, term: Any) -> None:
    got = encode(erlport_terms.to_term(value, Atom))
    assert repr(got) == repr(term)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def as_erlang(value: Any) -> Any:
    """A JSON value as Elixir programs write it."""
    if value is None or isinstance(value, bool):
        return {None: "nil", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return [as_erlang(item) for item in value]
    if isinstance(value, dict):
        return {key.encode(): as_erlang(item) for key, item in value.items()}
    return value


@given(JSON)
def test_any_json_value_goes_to_erlang_and_comes_back(value: Any) -> None:
    term = encode(erlport_terms.to_term(value, Atom))
    assert repr(term) == repr(as_erlang(value)), "no 1 for true, no undefined, no pickle"
    assert repr(erlport_terms.from_term(decode(term))) == repr(value)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.binary().map(Atom)
    | st.just(decode(PID))
    | st.builds(object),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.binary() | st.integers() | st.floats() | st.booleans() | st.none(), inner)
        | st.builds(ImproperList, st.lists(inner, min_size=1), inner)
    ),
    max_leaves=10,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANYTHING, ANYTHING)
def test_whatever_is_handed_over_nothing_is_raised_and_a_map_comes_back(held: Held, command: Any, args: Any) -> None:
    for reply in (encode(erlport.call(command, args)), encode(erlport.call(b"echo", args))):
        assert reply[b"success"] in ("true", "false")
        if reply[b"success"] == "false":
            assert type(reply[b"error"]) is bytes and type(reply[b"error_type"]) is bytes


@pytest.mark.parametrize("command", [b"echo", "echo", [101, 99, 104, 111]])
def test_a_command_is_a_binary_an_atom_or_a_charlist(held: Held, command: Any) -> None:
    assert call(command, {b"a": 1}) == {b"success": "true", b"result": {b"a": 1}}


@pytest.mark.parametrize("command", [1, 1.5, "true", "undefined", b"\xff", (b"echo",), [-1], [b"e"], [2**70], {}, PID])
def test_any_other_is_an_invalid_request(held: Held, command: Any) -> None:
    reply = call(command)
    assert reply[b"success"] == "false" and reply[b"error_type"] == b"invalid_request"
    assert reply[b"error"].startswith(b"command: expected text, a binary, an atom or a charlist, got ")


def test_args_may_be_left_out_or_nil_and_must_be_a_map_else(held: Held) -> None:
    empty = {b"success": "true", b"result": {}}
    assert encode(erlport.call(b"echo")) == encode(erlport.call(b"echo", None)) == call(b"echo", "nil") == empty
    for args in ([], b"", 1, "true"):
        reply = call(b"echo", args)
        assert reply[b"error_type"] == b"invalid_request" and reply[b"error"].startswith(b"args: expected an object")


def test_requests_and_replies_past_the_longest_frame_get_the_ports_errors(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are counted as they would be at a port: the JSON, with its envelope."""
    monkeypatch.setenv("DSPY_BRIDGE_MAX_FRAME_BYTES", "200")
    room = 200 - len('{"id":1,"command":"echo","args":{"a":""}}')
    assert call(b"echo", {b"a": b"x" * room})[b"success"] == "true"
    submit(b"r", b"twice", {b"a": b"x" * 100})
    assert received()[1][b"error_type"] == b"frame_too_large"
    assert b"the reply has" in call(b"twice", {b"a": b"x" * 100})[b"error"]
    too_long = {
        b"success": "false",
        b"error": b"frame of 201 bytes: expected at most 200",
        b"error_type": b"frame_too_large",
    }
    assert call(b"echo", {b"a": b"x" * (room + 1)}) == too_long
    submit(b"r", b"echo", {b"a": b"x" * (room + 1)})
    assert received() == (b"r", too_long)


def test_a_setting_that_cannot_be_read_is_told_by_every_call_until_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPY_BRIDGE_MAX_QUEUE", "many")
    text = b"DSPY_BRIDGE_MAX_QUEUE (--max-queue): expected a whole number of at least 0"
    wrong = {b"success": "false", b"error": text, b"error_type": b"internal"}
    submit(b"ref", b"ping")
    assert call(b"ping") == wrong and received() == (b"ref", wrong)
    monkeypatch.setenv("DSPY_BRIDGE_MAX_QUEUE", "5")
    assert call(b"ping")[b"success"] == "true"
    assert erlport._peer().settings.max_queue == 5


def test_submit_tells_each_under_its_reference_errors_too(held: Held) -> None:
    """A reference goes back as it came: make_ref() is opaque, and others are whatever the program likes."""
    ref = Opaque(Opaque.REFERENCE)
    for number, given_ref in enumerate((ref, b"binary", "atom", "größe", 7, ("tuple", 1), [1, 2], {b"a": 1})):
        submit(given_ref, b"later", {b"n": number})
        got, reply = received()
        assert got == given_ref and reply == {b"success": "true", b"result": {b"n": number}}
    submit(1, b"later", {b"n": (1,)})
    assert received()[1][b"error_type"] == b"invalid_args"
    submit(2, 5)
    assert received()[1][b"error_type"] == b"invalid_request"
    submit(3, b"nope")
    assert received()[1][b"error_type"] == b"unknown_command"


def test_what_is_submitted_runs_beside_each_other_within_the_limits(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPY_BRIDGE_MAX_IN_FLIGHT", "3")
    monkeypatch.setenv("DSPY_BRIDGE_MAX_QUEUE", "1")
    for number in range(5):
        submit(number, b"hold", {b"n": number})
    assert all(held.started.acquire(timeout=20) for _ in range(3))
    ref, reply = received()
    assert ref == 4 and reply[b"error_type"] == b"overloaded"
    held.release.set()
    assert {received()[0] for _ in range(4)} == {0, 1, 2, 3}


NAMES = ("gone", "nil", "true", "undefined", "größe")
OTHERS = (b"binary", 5, 1.5, [1], {}, (), ("gone",), ("gone", "node"), ("a", b"n@h"), (PID, "n@h"), ("a", "n@h", 1),
          Opaque(Opaque.PORT), Opaque(Opaque.FUN))  # fmt: skip


@pytest.mark.parametrize("receiver", [*NAMES, *OTHERS], ids=repr)
def test_a_receiver_that_may_end_the_instance_is_refused(held: Held, receiver: Any) -> None:
    """Erlang raises for a name that is not registered and for a term that is not an address: the instance ends.

    A port takes messages only from its owner, and {name, node} needs a node: those would be lost silently.
    """
    submit(1, b"hold", {b"n": 1})
    assert held.started.acquire(timeout=20)
    refused = submit_to(receiver, 2, b"later")
    assert refused[b"success"] == "false" and refused[b"error_type"] == b"invalid_request"
    assert refused[b"error"].startswith(b"pid: expected a pid, an alias or {name, node}, got ")
    held.release.set()
    assert received() == (1, {b"success": "true", b"result": {b"n": 1}})
    assert erlang.ended == [] and erlang.mailbox.empty()


PIDS_AND_REFERENCES = [Opaque(kind) for kind in (Opaque.PID, Opaque.OLD_PID, Opaque.REFERENCE, Opaque.OLD_REFERENCE)]


@pytest.mark.parametrize("receiver", [*PIDS_AND_REFERENCES, ("gone", "nonode@nohost")], ids=repr)
def test_a_pid_an_alias_and_a_name_with_its_node_are_sent_to(held: Held, receiver: Any) -> None:
    """Also the encodings of OTP 22 and older. None of these raises if the receiver is gone."""
    assert submit_to(receiver, 1, b"later") == "ok"
    assert erlang.mailbox.get(timeout=20)[0] == receiver


def test_a_tools_question_is_answered_at_once_with_an_error(held: Held) -> None:
    reply = call(b"ask")
    assert reply[b"error_type"] == b"tool_error" and b"search: tools need a port of their own" in reply[b"error"]
    submit(1, b"ask")
    assert received()[1] == reply


def test_outside_of_erlport_importing_is_fine_and_calling_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "erlport.erlterms", None)
    with pytest.raises(ModuleNotFoundError, match=r"erlport\.erlterms"):
        erlport.call(b"ping", {})


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_program_with_dspy(scenario: str, tmp_path: Path) -> None:
    """See there for what each says. Nothing is printed; what there is to log goes to stderr."""
    (tmp_path / "erlport").symlink_to(FAKES / "erlport")
    env = {name: value for name, value in os.environ.items() if not name.startswith("DSPY_BRIDGE_")}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support", tmp_path)))
    env["DSPY_BRIDGE_LM"] = "offline/echo"
    env["DSPY_BRIDGE_ALLOW_MODULES"] = "never_returns"
    command = [sys.executable, str(FAKES / "erlport_program.py"), scenario]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr.decode()
    log = done.stderr.decode()
    if scenario == "a_cast_that_fails_is_logged":
        assert re.match(r"dspy_bridge\[[0-9]+\] ERROR dspy_bridge: internal error \w{8}\nTraceback", log)
        assert re.search(r"\nValueError\n$", log)
    else:
        assert log == ""
