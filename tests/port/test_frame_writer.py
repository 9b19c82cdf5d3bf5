"""frame_writer: whole frames in order, from any thread, however slowly they are read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from peer import frame

from dspy_bridge.port.frame_writer import HIGH_WATER_BYTES, FrameWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        try:
            os.close(fd)
        except OSError:
            continue


def read(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += os.read(fd, count - len(data))
    return data


def test_a_full_pipe_blocks_no_sender_and_loses_nothing(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    writer = FrameWriter(writing, lambda _why: None)
    payloads = [bytes([n]) * size for n, size in enumerate((10, 70_000, 0, 300_000, 5, 200_000, 1))]
    for _ in range(3):
        writer.send(payloads)
    wanted = b"".join(frame(payload) for payload in payloads) * 3
    assert read(reading, len(wanted)) == wanted
    writer.wait_until_written(20)
    assert writer._waiting_bytes == 0 and writer._waiting == []


def test_frames_of_many_threads_stay_whole(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    writer = FrameWriter(writing, lambda _why: None)
    payload = b"x" * 100_000

    def send() -> None:
        for _ in range(10):
            writer.send([payload, b"y" * 10])

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(80):
        length = int.from_bytes(read(reading, 4), "big")
        data = read(reading, length)
        assert data in (payload, b"y" * 10)
    for thread in threads:
        thread.join()


def test_who_waits_for_room_goes_on_once_there_is_some(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    writer = FrameWriter(writing, lambda _why: None)
    writer.wait_for_room(lambda: False)
    writer.send([b"x" * (2 * HIGH_WATER_BYTES)])
    writer.wait_for_room(lambda: True)
    waiter = threading.Thread(target=writer.wait_for_room, args=(lambda: False,))
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    read(reading, 2 * HIGH_WATER_BYTES)
    waiter.join(20)
    assert not waiter.is_alive()


@pytest.mark.parametrize("waiting", [False, True])
def test_a_reader_that_is_gone_is_told_of(pipe: tuple[int, int], waiting: bool) -> None:
    """At the next write, or by the thread that waits for room in the pipe."""
    reading, writing = pipe
    gone = threading.Event()
    writer = FrameWriter(writing, lambda _why: gone.set())
    if waiting:
        writer.send([b"x" * (2 * HIGH_WATER_BYTES)])
        assert not gone.is_set()
    os.close(reading)
    if not waiting:
        writer.send([b"x"])
    assert gone.wait(20)
