"""From a frame to its one reply: what is quick is answered at once, the rest is a task of its own on an event loop.

`receive` runs on the reading thread. The loop has a thread of its own, started by the first request that needs it, and
all bookkeeping of running and waiting requests happens there.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from dspy_bridge import tracing
from dspy_bridge.dispatch import error_replies
from dspy_bridge.dispatch.call import Call, Command, Host
from dspy_bridge.dispatch.call_channel import Conversation
from dspy_bridge.dispatch.latency import CommandStats
from dspy_bridge.dispatch.limiter import Turns
from dspy_bridge.errors import BridgeError, Cancelled, FrameTooLarge, Overloaded, TimedOut, UnknownCommand
from dspy_bridge.runtime import allocator
from dspy_bridge.wire import messages
from dspy_bridge.wire.frames import TooLarge

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

# A deadline further away than this is none; it also keeps huge numbers out of the loop's clock.
_LONGEST_MS = 10 * 365 * 86_400_000


class Dispatcher:
    """Serves requests by a table of commands."""

    def __init__(
        self,
        commands: Mapping[str, Command],
        send: Callable[[Iterable[bytes]], None],
        *,
        max_in_flight: int,
        max_queue: int,
        max_frame_bytes: int,
        log_exception: Callable[[], str],
        when_room: Callable[[Callable[[], object]], bool],
        prepare_loop: Callable[[asyncio.AbstractEventLoop], None] = lambda _loop: None,
    ) -> None:
        """`send` writes reply payloads from any thread; `log_exception` logs the current one and gives its reference.

        `prepare_loop` gets the event loop before it runs, on its thread. `when_room(callback)` is false where there is
        room for more to be sent; else the callback is called, on any thread, when there is.
        """
        self._prepare_loop = prepare_loop
        self._commands = commands
        self._send = send
        self._max_frame_bytes = max_frame_bytes
        # The short way does not look at the limit: it is for hosts whose limit no such ping and no pong comes near.
        self._short_way = max_frame_bytes >= messages.QUICK_BYTES
        self._log_exception = log_exception
        self._pings = CommandStats()
        self._stats = {"ping": self._pings}
        self._stats_lock = threading.Lock()
        # From the reading thread to the loop: calls and cancels, in the order received.
        self._inbox: deque[Call | messages.Cancel | messages.ToolResult] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # Of the loop's thread alone, like all below; their sizes may be read by any.
        self._calls: dict[messages.Id, Call] = {}
        self._turns = Turns(max_in_flight, max_queue)
        self._outbox: list[bytes] = []
        self._open = 0
        self._on_idle: Callable[[], object] | None = None
        self._conversation = Conversation(self._push, when_room, max_frame_bytes)
        self._host = Host(self._conversation, self._turns, self._describe)

    def quick(self, data: bytes) -> bytes | None:
        """The packet that answers `data`, if that is one ping known by its bytes; else None. On the reading thread."""
        received = time.monotonic()
        packet = messages.quick_packet(data, time.time()) if self._short_way else None
        if packet is not None:
            # Without the lock: pings are counted and told on the reading thread only.
            self._pings.add(time.monotonic() - received, False)
        return packet

    def receive(self, frame: bytes | TooLarge) -> bytes | None:
        """Take one frame, on the reading thread. Returns the reply if it is there already."""
        received = time.monotonic()
        if isinstance(frame, bytes) and self._short_way:
            pong = messages.quick_pong(frame, time.time())
            if pong is not None:
                self._pings.add(time.monotonic() - received, False)
                return pong
        if isinstance(frame, TooLarge):
            if frame.no_memory:
                return messages.encode_failure(None, _no_memory(frame.length))
            text = f"frame of {frame.length} bytes: expected at most {self._max_frame_bytes}"
            return messages.encode_failure(None, messages.failure(FrameTooLarge.error_type, text))
        try:
            if not allocator.room_for(frame):
                return self._unread(frame, messages.readable_id(frame), _no_memory(len(frame)))
            request = messages.decode(frame)
        except MemoryError:
            return self._unread(frame, messages.readable_id(frame), _no_memory(len(frame)))
        except messages.MessageError as error:
            error_type = "invalid_json" if isinstance(error, messages.NotJSON) else "invalid_request"
            return self._unread(frame, error.id, messages.failure(error_type, error_replies.one_line(str(error))))
        if isinstance(request, messages.ToolResult) and not self._conversation.asked(request.call_id):
            text = error_replies.one_line(f"tool_result.call_id: there was no tool call {request.call_id}")
            return messages.encode_failure(None, messages.failure("invalid_request", text))
        if not isinstance(request, messages.Request):
            self._inbox.append(request)
            return None
        call = Call(request, received, self._host, len(frame))
        if request.traceparent is None:
            return self._begin(call)
        return tracing.context(request.traceparent).run(self._begin, call)

    def _unread(self, frame: bytes, id: messages.Id | None, failure: dict[str, Any]) -> bytes | None:
        """The reply to a frame that cannot be read; what a tool gave is refused where its call waits."""
        call_id = messages.readable_call_id(frame)
        if call_id is None or not self._conversation.asked(call_id):
            return messages.encode_failure(id, failure)
        self._inbox.append(messages.ToolResult(call_id, None, failure["error"]))
        return None

    def _begin(self, call: Call) -> bytes | None:
        request = call.request
        command = self._commands.get(request.command)
        try:
            if command is None:
                raise UnknownCommand(request.command)
            result = command.handler(request.args, call)
        except BaseException as error:  # not even a SystemExit out of a handler may end the reading
            return self._reply(call, None, error)
        if hasattr(result, "send"):
            call.work = result
            self._inbox.append(call)
            return None
        return self._reply(call, result, None)

    def wake(self) -> None:
        """Have the loop look at what `receive` took: once a batch of frames, as waking it costs a system call."""
        if not self._inbox:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_loop, name="dspy_bridge-loop", daemon=True)
            self._thread.start()
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._take_inbox)

    def when_idle(self, callback: Callable[[], object]) -> None:
        """Call `callback` once no request is open. For the reading thread, after its last `wake`."""
        if self._loop is None and not self._inbox:
            callback()
            return
        self._conversation.hang_up()
        self._on_idle = callback
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._take_inbox)

    def unfinished(self) -> int:
        """How many requests have not been answered."""
        return self._open + len(self._inbox)

    def load(self) -> dict[str, Any]:
        """`{"in_flight", "queued", "commands": {name: {"count", "errors", "p50_ms", "p99_ms"}}}`."""
        with self._stats_lock:
            commands = {name: stats.summary() for name, stats in self._stats.items() if stats.count}
        return {"in_flight": self._turns.running, "queued": self._turns.waiting, "commands": commands}

    # On the loop's thread.

    def _run_loop(self) -> None:
        from dspy_bridge.runtime.event_loop import Loop

        loop = Loop()
        self._prepare_loop(loop)
        self._conversation.on(loop)
        # From here on `wake` goes through the loop; what came before it is taken first.
        self._loop = loop
        loop.call_soon(self._take_inbox)
        while True:
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                # asyncio lets these two out of a task through the loop; the task has kept it for its reply.
                continue

    def _take_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Call):
                self._admit(item)
            elif isinstance(item, messages.ToolResult):
                self._conversation.answer(item)
            elif (call := self._calls.get(item.id)) is not None:
                self._stop(call, Cancelled("cancelled by the caller"))
        self._tell_idle()

    def _admit(self, call: Call) -> None:
        assert self._loop is not None
        self._open += 1
        limited = self._commands[call.request.command].limited
        if limited and self._turns.full:
            load = f"{self._turns.running} executes run and {self._turns.waiting} wait already"
            self._answer(call, None, Overloaded(load))
            return
        self._calls[call.request.id] = call
        timeout_ms = call.request.timeout_ms
        if timeout_ms is not None and timeout_ms < _LONGEST_MS:
            late = TimedOut(f"not finished within {timeout_ms:g} ms")
            call.handle = self._loop.call_at(call.received + timeout_ms / 1000, self._stop, call, late)
        if limited:
            call.start = lambda: self._start(call)
            self._turns.enter(call.start)
        else:
            self._start(call)

    def _start(self, call: Call) -> bool:
        assert self._loop is not None and call.work is not None
        call.started = time.monotonic()
        # Not in the context of what starts it: that may be the end of another call, which has a trace of its own.
        context = tracing.context(call.request.traceparent)
        call.task = context.run(self._loop.create_task, call.work)
        # Not code around `work` in the task: a task that is cancelled before its first step runs none of it.
        call.task.add_done_callback(lambda task: self._finished(call, task), context=context)
        return True

    def _finished(self, call: Call, task: asyncio.Task[Any]) -> None:
        try:
            if task.cancelled():
                self._answer(call, None, Cancelled("cancelled"))
            else:
                error = task.exception()
                self._answer(call, task.result() if error is None else None, error)
        finally:
            if call.start is not None and not call.gave_turn:
                self._turns.leave()

    def _stop(self, call: Call, why: BridgeError) -> None:
        """Answer now; the work is cancelled, however long it takes to notice."""
        if call.answered or (call.task is not None and call.task.done()):
            return  # what it has just finished is its answer
        self._answer(call, None, why)
        if call.task is not None:
            call.task.cancel()
        elif call.start is not None:
            self._turns.withdraw(call.start)

    def _answer(self, call: Call, result: Any, error: BaseException | None) -> None:
        if call.answered:
            return
        call.answered = True
        self._open -= 1
        if call.handle is not None:
            call.handle.cancel()
        if call.task is None and call.work is not None:
            # Never started: closing it spares the warning that nobody awaited it. All of its time was waiting.
            call.work.close()
            call.started = time.monotonic()
        if self._calls.get(call.request.id) is call:
            del self._calls[call.request.id]
        self._push(self._reply(call, result, error))

    def _push(self, payload: bytes) -> None:
        if not self._outbox:
            assert self._loop is not None
            self._loop.call_soon(self._flush)
        self._outbox.append(payload)

    def _flush(self) -> None:
        replies, self._outbox = self._outbox, []
        self._send(replies)
        if allocator.due:
            del replies
            allocator.give_back()
        self._tell_idle()

    def _tell_idle(self) -> None:
        if self._on_idle is not None and self._open == 0 and not self._outbox and not self._inbox:
            self._on_idle()
            self._on_idle = None

    # On either thread.

    def _reply(self, call: Call, result: Any, error: BaseException | None) -> bytes:
        request = call.request
        now = time.monotonic()
        meta = _meta(call, now) if request.meta else None
        payload = b""
        if error is None:
            try:
                payload = messages.encode_result(request.id, result, meta)
                if len(payload) > self._max_frame_bytes:
                    text = f"the reply has {len(payload)} bytes: expected at most {self._max_frame_bytes}"
                    raise FrameTooLarge(text)
            except BaseException as raised:  # a value's own code runs when it is encoded
                error = raised
        if call.settle is not None:
            call.settle(error is None)
        if error is not None:
            payload = self._error(request.id, error, meta)
        if request.command in self._commands:
            with self._stats_lock:
                self._stats.setdefault(request.command, CommandStats()).add(now - call.received, error is not None)
        return payload

    def _error(self, id: messages.Id, error: BaseException, meta: dict[str, Any] | None) -> bytes:
        payload = messages.encode_failure(id, self._describe(error), meta)
        if len(payload) > self._max_frame_bytes:
            # A limit of a few hundred bytes, or an id or a name that fills it.
            text = "the error is too long for a frame"
            payload = messages.encode_failure(id, messages.failure(FrameTooLarge.error_type, text))
        return payload

    def _describe(self, error: BaseException) -> dict[str, Any]:
        return error_replies.describe(error, self._log_exception)


def _no_memory(length: int) -> dict[str, Any]:
    text = f"frame of {length} bytes: there is not enough memory to read it; send less at once"
    return messages.failure(FrameTooLarge.error_type, text)


def _meta(call: Call, now: float) -> dict[str, Any]:
    asked: dict[str, Any] = {"lm_usage": {}, "lm_calls": 0, "cache_hits": 0}
    if call.meter is not None:
        try:
            asked = call.meter.summary()
        except Exception:  # what an LM of the host's own says of its usage may be anything
            pass
    return {
        "duration_ms": round((now - call.received) * 1000, 3),
        "queue_ms": round((call.started - call.received) * 1000, 3),
        **asked,
    }
