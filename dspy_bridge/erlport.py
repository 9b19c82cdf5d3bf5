"""The six commands for a program that runs Python through ErlPort 0.11, without a port of their own.

    {ok, Python} = python:start([{python_path, "…"}, {env, [{"DSPY_BRIDGE_LM", "openai/gpt-4o-mini"}]}]),
    python:call(Python, 'dspy_bridge.erlport', call, [<<"ping">>, #{}])
    python:call(Python, 'dspy_bridge.erlport', submit, [self(), make_ref(), <<"execute_program">>, Args])

Both use the port's dispatcher, with its limits and errors. It takes and returns JSON, so terms are converted to JSON
and replies from it. There is one per Python process, made by the first call; settings come from the environment alone.
ErlPort owns the process: its descriptors, signals and exit are not touched.

ErlPort runs one call at a time, on its main thread: while a `call` waits for an LM, all other calls to the same Python
process wait too. `submit` returns at once and the reply comes as a message, so any number of runs overlap: use it for
what calls an LM.

Not supported: the fields of the envelope (`stream`, `meta`, `timeout_ms`), cancelling, and tools of the client, as a
call has no way back while it runs.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from dspy_bridge import logs, settings
from dspy_bridge.commands.handlers import Commands
from dspy_bridge.dispatch import replies
from dspy_bridge.runtime.daemon_threads import DaemonThreads
from dspy_bridge.settings import SettingError
from dspy_bridge.wire import messages
from dspy_bridge.wire.erlport_terms import Unfit, check_receiver, from_term, to_command, to_term
from dspy_bridge.wire.frames import TooLarge
from dspy_bridge.wire.json_values import encode_value

_NO_TOOLS = "tools need a port of their own: a call through ErlPort has no way back while it runs"
# The kind of a payload, by its first two keys; the rest is not parsed on the event loop.
_HEAD = re.compile(rb'\{"id":([0-9]+),"(success|tool_call)":')


def call(command: Any, args: Any = None) -> dict[bytes, Any]:
    """Run a command; returns its reply as a map with binary keys, also for errors: nothing is raised.

    Until it returns, ErlPort runs no other call in this process; submitted commands go on.
    """
    answer: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    _send(command, args, answer.put)
    return _reply(answer.get())


def submit(pid: Any, ref: Any, command: Any, args: Any = None) -> Any:
    """Return `ok` at once; the reply, as `call` would return it, comes to `pid` as `{dspy_reply, ref, map}`.

    `pid` may be an alias or `{name, node}`. For anything else an error is returned.
    """
    try:
        check_receiver(pid)
    except Unfit as error:
        return _reply(_failure(error))
    _send(command, args, lambda payload: _casts.submit(_cast, pid, ref, payload))
    return _atom()(b"ok")


class Peer:
    """The dispatcher in ErlPort's process, and the calls that wait for its replies. Any thread may send."""

    def __init__(self) -> None:
        """Raises `SettingError`."""
        self.settings = settings.load(os.environ, {})
        self._dispatcher = Commands(self.settings, self._deliver).dispatcher
        self._ids = itertools.count(1)
        # Single operations on a dict are thread-safe.
        self._waiting: dict[int, Callable[[bytes], object]] = {}
        # The dispatcher expects one reading thread. Here any thread may be it, one at a time.
        self._reading = threading.Lock()

    def send(self, command: str, args: Any, reply: Callable[[bytes], object]) -> None:
        """Send a command. `reply` gets the payload that the port would send, once, on any thread."""
        id = next(self._ids)
        payload = encode_value({"id": id, "command": command, "args": args})
        self._waiting[id] = reply
        answer = self._receive(payload)
        if answer is not None:
            self._waiting.pop(id)(answer)

    def _receive(self, payload: bytes) -> bytes | None:
        fits = len(payload) <= self.settings.max_frame_bytes
        with self._reading:
            answer = self._dispatcher.receive(payload if fits else TooLarge(len(payload)))
            self._dispatcher.wake()
        return answer

    def _deliver(self, payloads: Iterable[bytes]) -> None:
        """On the event loop's thread."""
        for payload in payloads:
            head = _HEAD.match(payload)
            assert head is not None, "neither streams nor log frames are requested"
            if head[2] == b"success":
                self._waiting.pop(int(head[1]))(payload)
            else:
                tool_call = json.loads(payload)["tool_call"]
                result = {"call_id": tool_call["call_id"], "success": False, "error": _NO_TOOLS}
                self._receive(encode_value({"tool_result": result}))


# Sends replies to `submit`. Not the event loop: ErlPort takes long to encode a large reply, and its pipe may be full,
# which must not delay the other runs.
_casts = DaemonThreads(1, "dspy_bridge-cast")


@functools.cache
def _peer() -> Peer:
    """The peer; the first call makes it. Raises `SettingError`, until the environment is corrected."""
    return Peer()


def _send(command: Any, args: Any, reply: Callable[[bytes], object]) -> None:
    """As `Peer.send`, from terms; an error is sent as the reply."""
    try:
        _peer().send(to_command(command), from_term(args), reply)
    except Exception as error:
        reply(_failure(error))


def _failure(error: Exception) -> bytes:
    if isinstance(error, (Unfit, SettingError)):
        failure = messages.failure(getattr(error, "error_type", "internal"), replies.one_line(str(error)))
    else:
        failure = replies.describe(error)
    return messages.encode_failure(None, failure)


def _reply(payload: bytes) -> dict[bytes, Any]:
    """The term of a reply. Not parsed by jiter, which reads 200 levels: the result alone may have as many."""
    reply = json.loads(payload)
    del reply["id"]
    term: dict[bytes, Any] = to_term(reply, _atom())
    return term


def _cast(pid: Any, ref: Any, payload: bytes) -> None:
    try:
        importlib.import_module("erlport.erlang").cast(pid, (_atom()(b"dspy_reply"), ref, _reply(payload)))
    except EOFError:  # ErlPort raises it when Erlang is gone
        pass
    except Exception as error:  # such as a reference that ErlPort cannot encode
        logs.exception(error)


def _atom() -> Callable[[bytes], Any]:
    """ErlPort's type of atoms. Its Python side comes with its Erlang package, so it is missing elsewhere."""
    atom: Callable[[bytes], Any] = importlib.import_module("erlport.erlterms").Atom
    return atom
