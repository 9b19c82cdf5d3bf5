"""The port program: reads frames on the main thread, hands each to the dispatcher, ends as its owner would want.

What can be answered at once is answered right here, many frames a read and one write for all of their replies; the rest
runs on the dispatcher's event loop, so that reading never waits for an LM or for DSPy's import.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import threading
import time

from dspy_bridge import messages
from dspy_bridge.frames import FrameDecoder
from dspy_bridge.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

    from dspy_bridge.dispatcher import Dispatcher

# What Linux's pipes hold; more is not there to be read at once.
READ_BYTES = 1 << 16


def serve(reading: int, writer: Writer, dispatcher: Dispatcher, max_frame_bytes: int, drain_ms: int) -> None:
    """Serve frames from `reading` until the end of input, then drain for at most `drain_ms` and return."""
    terminated = _handle_signals(reading)
    decoder = FrameDecoder(max_frame_bytes)
    first = True
    while data := _read(reading):
        replies = []
        for frame in decoder.feed(data):
            reply = dispatcher.receive(frame)
            if reply is not None:
                replies.append(reply)
        if replies:
            writer.send(replies)
        dispatcher.wake()
        if first:
            # After the first answer, before the second question: see messages.
            messages.load_codec()
            first = False
        writer.wait_for_room(terminated.is_set)
    if decoder.mid_frame:
        log("end of input inside a frame: it was dropped")
    _drain(writer, dispatcher, drain_ms / 1000)


def exit_now() -> None:
    """The reader of our replies is gone: nothing that still runs here is of use to anybody."""
    os._exit(0)


def log(line: str) -> None:
    """One line on stderr. For what must be said without logging, which costs 10 ms to import."""
    os.write(2, f"dspy_bridge[{os.getpid()}]: {line}\n".encode())


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, READ_BYTES)
    except OSError as error:
        # A socket whose other end was reset; for a pipe this does not happen.
        log(f"end of input: {error.strerror}")
        return b""


def _handle_signals(reading: int) -> threading.Event:
    """Make SIGTERM the end of input; the event tells that it came."""
    null = os.open(os.devnull, os.O_RDONLY)
    terminated = threading.Event()

    def end_of_input(_signal: int, _frame: FrameType | None) -> None:
        # The read under way is interrupted by the signal and repeated by Python (PEP 475), then on this descriptor.
        os.dup2(null, reading, inheritable=False)
        terminated.set()

    signal.signal(signal.SIGTERM, end_of_input)
    mode = os.fstat(reading).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        # Ctrl-C in iex reaches the whole foreground process group; what stops us is the end of input.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return terminated


def _drain(writer: Writer, dispatcher: Dispatcher, seconds: float) -> None:
    """Let received work finish and be written, unless nobody is left to read it."""
    end = time.monotonic() + seconds
    idle_read, idle_write = os.pipe()
    dispatcher.when_idle(lambda: os.write(idle_write, b"."))
    poller = select.poll()
    poller.register(idle_read, select.POLLIN)
    # With no events asked for, poll still tells POLLERR: the reading end of the pipe was closed.
    poller.register(writer.fd, 0)
    while (left := end - time.monotonic()) > 0:
        ready = poller.poll(left * 1000)
        if any(fd == writer.fd for fd, _ in ready):
            exit_now()
        if ready:
            writer.wait_until_written(max(0.0, end - time.monotonic()))
            break
    else:
        log(f"end of input: {dispatcher.unfinished()} requests were still running after {seconds:g} s")
    # Exit handlers (tracing exporters flush there) get what is left of the time; threads that do not end get no more.
    timer = threading.Timer(max(0.5, end - time.monotonic()), exit_now)
    timer.daemon = True
    timer.start()
    sys.stderr.flush()
