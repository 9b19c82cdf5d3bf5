"""The read loop of the port program, on the main thread, and its orderly end.

Quick commands are answered here, many frames per read and one write for all of their replies. The rest runs on the
dispatcher's event loop, so that reading never waits for an LM or for DSPy's import.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import threading
import time

from dspy_bridge.port import watchdog
from dspy_bridge.port.frame_writer import HIGH_WATER_BYTES, FrameWriter
from dspy_bridge.port.stdio import log
from dspy_bridge.wire.frames import FrameDecoder, TooLarge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

    from dspy_bridge.dispatch.dispatcher import Dispatcher

# The buffer of a read: as much as a pipe holds, but inside a large frame so much that the C library maps memory for it.
# That costs a read 10 µs; the pieces of 64 MB would stay in the heap, though, when they are free.
SMALL_READ_BYTES = 1 << 16
LARGE_READ_BYTES = 1 << 20


def serve(reading: int, writer: FrameWriter, dispatcher: Dispatcher, max_frame_bytes: int, drain_ms: int) -> None:
    """Serve frames from `reading` until the end of input, then drain for at most `drain_ms` and return."""
    terminated = _handle_signals(reading)
    # For the drain: at the end of input there may be no descriptors left.
    idle = os.pipe()
    decoder = FrameDecoder(max_frame_bytes)
    # Local names, as they are found sooner.
    read, answer_pings, send_packet = os.read, dispatcher.answer_pings, writer.send_packet
    inside_frame = started = False
    try:
        while data := read(reading, LARGE_READ_BYTES if inside_frame else SMALL_READ_BYTES):
            if inside_frame or (data := answer_pings(data, send_packet)):
                _serve_frames(decoder.feed(data), writer, dispatcher, terminated)
                inside_frame = decoder.mid_frame
            if writer.full:
                writer.wait_for_room(terminated.is_set)
            if not started and not select.select([reading], [], [], 0)[0]:
                # The first answer is sent and nothing waits. The loop imports DSPy: the client's first program, which
                # it may give little time, finds that begun.
                started = True
                dispatcher.start()
    except OSError as error:
        # A socket that was reset; this does not happen to a pipe.
        log(f"end of input: {error.strerror}")
    if decoder.mid_frame:
        log("end of input inside a frame: it was dropped")
    _drain(writer, dispatcher, drain_ms / 1000, *idle)


def exit_now(why: str | None = None) -> None:
    """End the process and its descendants at once: replies cannot be written. `why`: None if nobody reads them."""
    if why is not None:
        log(f"stdout: {why}")
    watchdog.end_children()
    os._exit(0 if why is None else 1)


def _serve_frames(
    frames: list[bytes | TooLarge], writer: FrameWriter, dispatcher: Dispatcher, terminated: threading.Event
) -> None:
    """Serve the frames of one read: one write for all immediate replies, one wake-up of the loop for the rest."""
    replies: list[bytes] = []
    size = 0
    for frame in frames:
        reply = dispatcher.receive(frame)
        if reply is not None:
            replies.append(reply)
            size += len(reply)
            if size >= HIGH_WATER_BYTES:
                # Small requests may have large replies, which must not pile up within one read either.
                writer.send(replies)
                replies, size = [], 0
                dispatcher.wake()
                writer.wait_for_room(terminated.is_set)
    if replies:
        writer.send(replies)
    dispatcher.wake()


def _handle_signals(reading: int) -> threading.Event:
    """Treat SIGTERM as the end of input; it sets the returned event."""
    null = os.open(os.devnull, os.O_RDONLY)
    terminated = threading.Event()

    def end_of_input(_signal: int, _frame: FrameType | None) -> None:
        # The signal interrupts the read, which Python repeats (PEP 475), now on this descriptor.
        os.dup2(null, reading, inheritable=False)
        terminated.set()

    signal.signal(signal.SIGTERM, end_of_input)
    # As multiprocessing makes them: SIGTERM ends a fork.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    mode = os.fstat(reading).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        # Ctrl-C in iex reaches the whole foreground process group; only the end of input stops the peer.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return terminated


def _drain(writer: FrameWriter, dispatcher: Dispatcher, seconds: float, idle_read: int, idle_write: int) -> None:
    """Wait for received work and the writing of its replies, unless nobody reads them. `idle_*`: an empty pipe."""
    end = time.monotonic() + seconds
    dispatcher.when_idle(lambda: os.write(idle_write, b"."))
    poller = select.poll()
    poller.register(idle_read, select.POLLIN)
    # With no events requested, poll still reports POLLERR: the reading end of the pipe was closed.
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
    # Exit handlers (tracing exporters flush there) get the rest of the time, while the owner is there.
    end = max(end, time.monotonic() + 0.5)
    poller.unregister(idle_read)

    def exit_in_time() -> None:
        poller.poll(max(0.0, end - time.monotonic()) * 1000)
        exit_now()

    threading.Thread(target=exit_in_time, name="dspy_bridge-exit", daemon=True).start()
