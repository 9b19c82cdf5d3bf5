"""From a frame to its one reply: quick commands are answered at once, others run as tasks on an event loop.

`receive` runs on the reading thread. The event loop has a thread of its own, started by the first request that needs
it; all bookkeeping of running and waiting requests happens there.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from dspy_bridge import tracing
from dspy_bridge.dispatch.call import Call, Channel, Limiter
from dspy_bridge.dispatch.replies import ReplyEncoder, one_line
from dspy_bridge.errors import BridgeError, Cancelled, FrameTooLarge, Overloaded, TimedOut, UnknownCommand
from dspy_bridge.wire import frames, messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from dspy_bridge.runtime.event_loop import EventLoop

    # Returns the result, or a coroutine that does.
    Handler = Callable[[dict[str, Any], Call], Any]

# A longer deadline counts as none, which keeps huge numbers out of the loop's clock.
LONGEST_MS = 10 * 365 * 86_400_000


class Dispatcher:
    """Serves requests by a table of commands."""

    def __init__(
        self,
        commands: Mapping[str, Handler],
        send: Callable[[Iterable[bytes]], None],
        *,
        max_in_flight: int,
        max_queue: int,
        max_frame_bytes: int,
        when_room: Callable[..., bool],
        on_start: Callable[[], object] = lambda: None,
    ) -> None:
        """`send` writes reply payloads, from any thread.

        `when_room`: see `FrameWriter`. `on_start` is called on the event loop's thread before that runs.
        """
        self._commands = commands
        self._send = send
        self._max_frame_bytes = max_frame_bytes
        self._on_start = on_start
        self._replies = ReplyEncoder(commands, max_frame_bytes)
        # `answer_pings` does not check the limit: it is used only where no ping or pong comes near it.
        self._answers_pings = max_frame_bytes >= frames.MAX_PING_BYTES
        # From the reading thread to the loop, in the order received.
        self._inbox: deque[Call | messages.Cancel | messages.ToolResult] = deque()
        self._loop: EventLoop | None = None
        self._thread: threading.Thread | None = None
        # The rest belongs to the loop's thread; any thread may read the counts.
        self._calls: dict[messages.Id, Call] = {}
        self._limiter = Limiter(max_in_flight, max_queue)
        self._outbox: list[bytes] = []
        self._open = 0
        self._on_idle: Callable[[], object] | None = None
        self._channel = Channel(self._push, when_room, max_frame_bytes)

    def answer_pings(self, data: bytes, send_packet: Callable[[bytes], None]) -> bytes:
        """Answer the pings that `data`, read from the client, starts with. Returns what follows them."""
        received = time.monotonic()
        pongs, count, used = frames.answer_pings(data, time.time())
        if not count or not self._answers_pings or (self._loop is not None and self._loop.blocked is not None):
            return data
        # Without the lock: pings are counted and reported on the reading thread only.
        self._replies.pings.add(time.monotonic() - received, count=count)
        send_packet(pongs)
        return data[used:]

    def receive(self, frame: bytes | frames.TooLarge) -> bytes | None:
        """Take one frame, on the reading thread. Returns the reply if there is one already."""
        received = time.monotonic()
        if isinstance(frame, frames.TooLarge):
            text = f"frame of {frame} bytes: expected at most {self._max_frame_bytes}"
            return messages.encode_failure(None, messages.failure(FrameTooLarge.error_type, text))
        try:
            request = messages.decode(frame)
            if isinstance(request, messages.ToolResult) and not self._channel.made_call(request.call_id):
                raise messages.MessageError(f"tool_result.call_id: there was no tool call {request.call_id}")
        except messages.MessageError as error:
            failure = messages.failure(error.error_type, one_line(str(error)))
            # If it is the result of a tool call, that call fails instead.
            call_id = messages.readable_call_id(frame)
            if call_id is None or not self._channel.made_call(call_id):
                return messages.encode_failure(error.id, failure)
            request = messages.ToolResult(call_id, None, failure["error"])
        if not isinstance(request, messages.Request):
            self._inbox.append(request)
            return None
        call = Call(request, received, len(frame), self._channel, self._limiter)
        if request.traceparent is None:
            return self._begin(call)
        return tracing.context(request.traceparent).run(self._begin, call)

    def wake(self) -> None:
        """Let the loop take what `receive` left for it. Once per batch of frames, as it costs a system call."""
        if not self._inbox:
            return
        if self._thread is None:
            self.start()
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._take_inbox)

    def start(self) -> None:
        """Start the loop, if no request has: it takes its time. For the reading thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_loop, name="dspy_bridge-loop", daemon=True)
            self._thread.start()

    def when_idle(self, callback: Callable[[], object]) -> None:
        """Call `callback` once no request is open. For the reading thread, after its last `wake`."""
        if self._thread is None:
            callback()
            return
        # Not before a loop that starts runs: while Python exits it refuses some imports, and new threads.
        self._on_idle = callback
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._take_inbox)

    def unfinished(self) -> int:
        """The number of requests without a reply."""
        return self._open + len(self._inbox)

    def counts(self) -> dict[str, Any]:
        """`{"in_flight", "queued", "commands": {name: {"count", "errors", "p50_ms", "p99_ms"}}}`."""
        return {
            "in_flight": self._limiter.running,
            "queued": len(self._limiter.waiting),
            "commands": self._replies.summaries(),
        }

    def _begin(self, call: Call) -> bytes | None:
        handler = self._commands.get(call.request.command)
        try:
            if handler is None:
                raise UnknownCommand(call.request.command)
            if call.request.command == "ping" and self._loop is not None and self._loop.blocked is not None:
                # Only the loop's code knows when it returns: a monitor that pings is to replace this peer.
                raise BridgeError(self._loop.blocked)
            result = handler(call.request.args, call)
        except BaseException as error:  # not even a SystemExit out of a handler may end the reading
            return self._replies.encode(call, None, error)
        if hasattr(result, "send"):
            call.work, call.started = result, None
            self._inbox.append(call)
            return None
        return self._replies.encode(call, result, None)

    # On the loop's thread.

    def _run_loop(self) -> None:
        from dspy_bridge.runtime.event_loop import EventLoop

        loop = EventLoop()
        self._on_start()
        self._channel.loop, self._channel.thread = loop, threading.get_ident()
        # From here on `wake` goes through the loop; what came before is taken first.
        self._loop = loop
        loop.call_soon(self._take_inbox)
        loop.run_on_thread(watched=True)

    def _take_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Call):
                self._admit(item)
            elif isinstance(item, messages.ToolResult):
                self._channel.deliver(item)
            elif (call := self._calls.get(item.id)) is not None:
                self._stop(call, Cancelled("cancelled by the caller"))
        if self._on_idle is not None:
            self._channel.close()
        self._report_idle()

    def _admit(self, call: Call) -> None:
        assert self._loop is not None and call.work is not None
        self._open += 1
        if call.limited and self._limiter.full:
            call.work.close()  # else Python warns that it was never awaited
            load = f"{self._limiter.running} calls are running and {len(self._limiter.waiting)} are waiting"
            self._answer(call, None, Overloaded(load))
            return
        self._calls[call.id] = call
        timeout_ms = call.request.timeout_ms
        if timeout_ms is not None and timeout_ms < LONGEST_MS:
            late = TimedOut(f"not finished within {timeout_ms:g} ms")
            call.ends = call.received + timeout_ms / 1000
            call.deadline = self._loop.call_at(call.ends, self._stop, call, late)
        if call.limited:
            call.slot = self._limiter.slot()
        # Not in the current context, which is that of the request that woke the loop.
        context = tracing.context(call.request.traceparent)
        call.task = context.run(self._loop.create_task, self._run(call))
        # Not in the task itself: a task that is cancelled before its first step runs no code.
        call.task.add_done_callback(lambda task: self._finished(call, task), context=context)

    async def _run(self, call: Call) -> Any:
        assert call.work is not None
        if call.slot is not None:
            await call.slot
        call.started = time.monotonic()
        return await call.work

    def _finished(self, call: Call, task: asyncio.Task[Any]) -> None:
        assert call.work is not None
        call.work.close()
        try:
            if task.cancelled():
                self._answer(call, None, Cancelled("cancelled"))
            else:
                error = task.exception()
                self._answer(call, task.result() if error is None else None, error)
        finally:
            if call.slot is not None and not call.slot_transferred:
                self._limiter.leave(call.slot)

    def _stop(self, call: Call, why: BridgeError) -> None:
        """Reply now and cancel the work, however long it takes to notice."""
        if call.answered or call.task is None or call.task.done():
            return  # the work has just finished, and its result is the reply
        self._answer(call, None, why)
        call.task.cancel()

    def _answer(self, call: Call, result: Any, error: BaseException | None) -> None:
        if call.answered:
            return
        call.answered = True
        self._open -= 1
        if call.deadline is not None:
            call.deadline.cancel()
        if self._calls.get(call.id) is call:
            del self._calls[call.id]
        self._push(self._replies.encode(call, result, error))

    def _push(self, payload: bytes) -> None:
        if not self._outbox:
            assert self._loop is not None
            self._loop.call_soon(self._flush)
        self._outbox.append(payload)

    def _flush(self) -> None:
        payloads, self._outbox = self._outbox, []
        self._send(payloads)
        self._report_idle()

    def _report_idle(self) -> None:
        if self._on_idle is not None and self._open == 0 and not self._outbox and not self._inbox:
            self._on_idle()
            self._on_idle = None
