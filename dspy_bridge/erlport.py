"""The six commands as functions for ErlPort 0.11, without a port of their own.

    {ok, Python} = python:start([{python_path, "…"}, {env, [{"DSPY_BRIDGE_LM", "openai/gpt-4o-mini"}]}]),
    python:call(Python, 'dspy_bridge.erlport', call, [<<"ping">>, #{}])
    python:call(Python, 'dspy_bridge.erlport', submit, [self(), make_ref(), <<"execute_program">>, Args])

Both use the dispatcher of the port program, with its limits and errors. Its requests and replies are JSON, so terms are
converted to JSON and back. Each Python process has one dispatcher, made by the first call; settings come from the
environment only. The process belongs to ErlPort: this module leaves its descriptors, signals and exit alone.

ErlPort runs one call at a time, on its main thread: while a `call` waits for an LM, every other call to the same Python
process waits too, and this side cannot change that. `submit` returns at once and its reply is a message, so any number
of programs run concurrently: use it for commands that call an LM.

Not supported: the request options (`stream`, `meta`, `timeout_ms`), cancelling, and tools of the caller, as a running
call cannot call back.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import queue
import re
import threading

from dspy_bridge import app, settings
from dspy_bridge.dispatch import error_replies
from dspy_bridge.runtime import allocator
from dspy_bridge.settings import SettingError
from dspy_bridge.wire import messages
from dspy_bridge.wire.erlport_terms import Unfit, WrongCall, check_receiver, from_term, to_command, to_term
from dspy_bridge.wire.frames import TooLarge
from dspy_bridge.wire.json_values import encode_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

_NO_TOOLS = "tools need a port of their own: a call through ErlPort has no way back while it runs"
# What a payload is, by its first two keys: nothing more is read of it on the event loop.
_HEAD = re.compile(rb'\{"id":([0-9]+),"(success|tool_call)":')


def call(command: Any, args: Any = None) -> dict[bytes, Any]:
    """Carry out a command; returns its reply as a map with binary keys, errors too: nothing is raised.

    Until it returns, ErlPort carries out no other call to this Python; what was submitted before goes on.
    """
    atom = _atom()
    answer: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    _send(command, args, answer.put)
    reply = _reply(answer.get(), atom)
    allocator.trim()
    return reply


def submit(pid: Any, ref: Any, command: Any, args: Any = None) -> Any:
    """Return `ok` at once; the reply, as `call` would return it, comes to `pid` as `{dspy_reply, ref, map}`.

    `pid` may be an alias or `{name, node}`. For anything else the error is returned, as no reply can be sent to it.
    """
    atom = _atom()
    try:
        check_receiver(pid)
    except WrongCall as error:
        return _reply(messages.encode_failure(None, messages.failure("invalid_request", str(error))), atom)
    _start_caster()
    _send(command, args, lambda payload: _casts.put((pid, ref, payload)))
    return atom(b"ok")


class Peer:
    """The dispatcher in ErlPort's process, and the callbacks that wait for its replies. Any thread may send."""

    def __init__(self) -> None:
        """Raises `SettingError`."""
        self.settings = settings.load(os.environ, {})
        self._dispatcher = app.build_dispatcher(self.settings, self._deliver)
        self._ids = itertools.count(1)
        # Single steps on it are safe from any thread.
        self._waiting: dict[int, Callable[[bytes], object]] = {}
        # The dispatcher expects one reading thread. Here any thread may be that, one at a time.
        self._reading = threading.Lock()

    def send(self, command: str, args: Any, reply: Callable[[bytes], object]) -> None:
        """Run a command. `reply` gets the payload that the port would send, once, on any thread."""
        id = next(self._ids)
        payload = encode_value({"id": id, "command": command, "args": args})
        allocator.note_payload(len(payload))
        self._waiting[id] = reply
        try:
            answer = self._receive(payload)
        except BaseException:  # the loop's thread could not be started, an interrupt
            self._waiting.pop(id, None)
            raise
        if answer is not None:
            self._answer(id, answer)

    def _receive(self, payload: bytes) -> bytes | None:
        fits = len(payload) <= self.settings.max_frame_bytes
        with self._reading:
            answer = self._dispatcher.receive(payload if fits else TooLarge(len(payload)))
            self._dispatcher.wake()
        return answer

    def _answer(self, id: int, payload: bytes) -> None:
        allocator.note_payload(len(payload))
        reply = self._waiting.pop(id, None)
        if reply is not None:
            reply(payload)

    # On the event loop's thread.

    def _deliver(self, payloads: Iterable[bytes]) -> None:
        for payload in payloads:
            head = _HEAD.match(payload)
            assert head is not None, "neither streams nor log frames are requested"
            if head[2] == b"success":
                self._answer(int(head[1]), payload)
            else:
                asked = json.loads(payload)["tool_call"]
                result = {"call_id": asked["call_id"], "success": False, "error": _NO_TOOLS}
                self._receive(encode_value({"tool_result": result}))


_lock = threading.Lock()
_peer: Peer | None = None
# The replies of `submit`. A thread sends them, not the event loop: ErlPort takes long to encode a large reply, and its
# pipe may be full; neither may block other calls.
_casts: queue.SimpleQueue[tuple[Any, Any, bytes]] = queue.SimpleQueue()
_caster: threading.Thread | None = None


def _the_peer() -> Peer:
    """The peer, made on first use. Raises `SettingError`; each call tries again: the environment may have changed."""
    global _peer
    with _lock:
        if _peer is None:
            _peer = Peer()
        return _peer


def _send(command: Any, args: Any, reply: Callable[[bytes], object]) -> None:
    """As `Peer.send`, from terms; errors become the reply."""
    try:
        peer = _the_peer()
        peer.send(to_command(command), from_term(args), reply)
        return
    except Unfit as unfit:
        failure = messages.failure(unfit.error_type, error_replies.one_line(str(unfit)))
    except WrongCall as error:
        failure = messages.failure("invalid_request", str(error))
    except SettingError as error:
        failure = messages.failure("internal", error_replies.one_line(str(error)))
    except Exception as error:
        failure = error_replies.describe(error, _log_exception)
    reply(messages.encode_failure(None, failure))


def _reply(payload: bytes, atom: Callable[[bytes], Any]) -> dict[bytes, Any]:
    """A payload as a term. Decoded without jiter, which allows 200 levels: the result alone may have as many."""
    try:
        reply = json.loads(payload)
        del reply["id"]
        term: dict[bytes, Any] = to_term(reply, atom)
    except Exception as error:
        term = to_term(error_replies.describe(error, _log_exception), atom)
    return term


def _start_caster() -> None:
    global _caster
    with _lock:
        if _caster is None:
            _caster = threading.Thread(target=_cast_all, name="dspy_bridge-cast", daemon=True)
            _caster.start()


def _cast_all() -> None:
    while True:
        # A separate function, as locals here would keep the last reply alive while this waits.
        _cast(*_casts.get())
        allocator.trim()


def _cast(pid: Any, ref: Any, payload: bytes) -> None:
    atom = _atom()
    try:
        importlib.import_module("erlport.erlang").cast(pid, (atom(b"dspy_reply"), ref, _reply(payload, atom)))
    except EOFError:  # ErlPort raises this when Erlang is gone, and with it every caller
        pass
    except Exception as error:  # a reference that ErlPort cannot encode must not stop the thread
        _log_exception(error)


def _atom() -> Callable[[bytes], Any]:
    """ErlPort's atom type. It comes with ErlPort's Erlang package, which adds it to the path."""
    atom: Callable[[bytes], Any] = importlib.import_module("erlport.erlterms").Atom
    return atom


def _log_exception(error: BaseException) -> str:
    return app.log_exception(error, "info" if _peer is None else _peer.settings.log_level)
