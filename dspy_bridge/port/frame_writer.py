"""Writes frames to the pipe, from any thread.

A send writes at once, on the calling thread, while the pipe has room. The rest is queued, and a thread of this module
writes it when there is room again, so that no sender waits for the client to read.
"""

from __future__ import annotations

import os
import select
import threading

from dspy_bridge.wire.frames import header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# With this many bytes queued, no more requests are read (`wait_for_room`).
HIGH_WATER_BYTES = 1 << 20
# Smaller payloads are joined, so that a batch is one write; larger ones are not worth copying.
_JOIN_BELOW_BYTES = 1 << 16


class FrameWriter:
    """Writes whole frames to `fd`, in order. `on_gone` is called, on any thread, when it takes no more.

    Its argument is why, or None if the client has closed it.
    """

    def __init__(self, fd: int, on_gone: Callable[[str | None], None]) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._on_gone = on_gone
        self._lock = threading.Lock()
        # Wakes `wait_for_room`, and the thread that writes the queue.
        self._changed = threading.Condition(self._lock)
        self._waiting: list[memoryview] = []
        self._waiting_bytes = 0
        # Whether the high-water mark is reached.
        self.full = False
        # Called when it is no longer full, or when nothing is queued.
        self._on_room: list[Callable[[], object]] = []
        self._on_written: list[Callable[[], object]] = []
        self._thread: threading.Thread | None = None

    def send(self, payloads: Iterable[bytes]) -> None:
        """Write each payload as a frame; never blocks."""
        chunks: list[bytes] = []
        small: list[bytes] = []
        for payload in payloads:
            length = len(payload)
            small.append(header(length))
            if length < _JOIN_BELOW_BYTES:
                small.append(payload)
            else:
                chunks += (b"".join(small), payload)
                small = []
        if small:
            chunks.append(b"".join(small))
        with self._lock:
            for chunk in chunks:
                self._put(chunk)

    def send_packet(self, packet: bytes) -> None:
        """As `send`, of one or more whole packets: each payload has its length before it."""
        with self._lock:
            self._put(packet)

    def wait_for_room(self, given_up: Callable[[], bool]) -> None:
        """Return when less than `HIGH_WATER_BYTES` are queued, or `given_up()` is true.

        This is the backpressure: the peer stops reading from a client that does not read.
        """
        with self._lock:
            while self.full and not given_up():
                # A signal handler cannot notify: it runs on this thread, which may hold the lock.
                self._changed.wait(0.1)

    def when_room(self, callback: Callable[[], object], *, written: bool = False) -> bool:
        """False if there is room; else `callback` is called when there is, on a thread of this module.

        `written`: not for room, but for all that was sent to be in the pipe.
        """
        with self._lock:
            waits = bool(self._waiting) if written else self.full
            if waits:
                (self._on_written if written else self._on_room).append(callback)
            return waits

    def wait_until_written(self, timeout: float) -> None:
        """Return when nothing is queued, or after `timeout` seconds."""
        with self._lock:
            self._changed.wait_for(lambda: not self._waiting, timeout)

    def _put(self, chunk: bytes) -> None:
        rest = memoryview(chunk) if self._waiting else self._write(chunk)
        if rest is not None:
            self._waiting.append(rest)
            self._waiting_bytes += len(rest)
            self.full = self._waiting_bytes >= HIGH_WATER_BYTES
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_waiting, name="dspy_bridge-writer", daemon=True)
                self._thread.start()
            else:
                self._changed.notify_all()

    def _write(self, chunk: bytes | memoryview) -> memoryview | None:
        """Write what the pipe takes; returns the rest, or None."""
        while True:
            try:
                written = os.write(self.fd, chunk)
            except BlockingIOError:
                return memoryview(chunk)
            except OSError as error:
                # The other end is gone; or it is a file, on a disk that is full.
                self._on_gone(None if isinstance(error, ConnectionError) else error.strerror)
                return None
            if written == len(chunk):
                return None
            chunk = memoryview(chunk)[written:]

    def _write_waiting(self) -> None:
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        while True:
            with self._lock:
                while not self._waiting:
                    self._changed.wait()
            # Outside the lock: the pipe may stay full for long, and senders must not wait for it.
            poller.poll()
            with self._lock:
                self._write_what_fits()
                self._changed.notify_all()
                found_room, self._on_room = ([], self._on_room) if self.full else (self._on_room, [])
                if not self._waiting:
                    found_room, self._on_written = [*found_room, *self._on_written], []
            for callback in found_room:
                callback()

    def _write_what_fits(self) -> None:
        # A function of its own, as locals would keep the last large payload alive while the thread waits.
        while self._waiting:
            chunk = self._waiting[0]
            rest = self._write(chunk)
            self._waiting_bytes -= len(chunk) - (0 if rest is None else len(rest))
            self.full = self._waiting_bytes >= HIGH_WATER_BYTES
            if rest is not None:
                self._waiting[0] = rest
                break
            del self._waiting[0]
