"""logs: one way out for all records, and no prompts at debug level."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspy_bridge import tracing
from dspy_bridge.logs import peer_log
from dspy_bridge.port.frame_writer import HIGH_WATER_BYTES, FrameWriter
from dspy_bridge.wire import messages
from dspy_bridge.wire.frames import FrameDecoder

NAMES = ("", "LiteLLM", "dspy", "httpx", "host")


def ours() -> Any:
    return next(handler for handler in logging.getLogger().handlers if isinstance(handler, peer_log._Queued))


@pytest.fixture
def frames() -> Iterator[Callable[[], list[Any]]]:
    """Gives what was logged up to now, at debug level; everything is put back afterwards."""
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(logger.level, list(logger.handlers), list(logger.filters), logger.propagate) for logger in loggers]
    loggers[0].handlers.clear()
    # Those of a dispatcher that an earlier test started in this process.
    for logger in loggers:
        logger.filters.clear()
    sent: list[Any] = []
    peer_log.setup("debug", lambda *record: sent.append(json.loads(messages.encode_log(*record))["log"]))

    def written() -> list[Any]:
        for _ in range(60):
            ours().flush()  # waits for the thread that writes, but not for ever
        return sent

    yield written
    logging.captureWarnings(False)
    for logger, (level, handlers, filters, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:], logger.propagate = handlers, filters, propagate


def test_litellm_is_silent_whatever_handler_it_brings(
    frames: Callable[[], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("LiteLLM")
    library.addHandler(logging.StreamHandler())
    library.error("a prompt")
    assert frames() == [] and capsys.readouterr().err == ""


def test_debug_is_for_the_peer_and_the_host_not_for_what_tells_prompts(frames: Callable[[], list[Any]]) -> None:
    for name in ("LiteLLM", "dspy", "dspy.clients.cache", "httpx", "host", "dspy_bridge"):
        logging.getLogger(name).debug("prompt")
    assert [record["logger"] for record in frames()] == ["host", "dspy_bridge"]


def test_a_record_has_the_trace_of_the_request_that_it_was_made_for(frames: Callable[[], list[Any]]) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    host = logging.getLogger("host")
    tracing.context(trace).run(host.error, "with")
    tracing.context(None).run(host.error, "without")
    host.error("without")
    assert [(record["message"], record.get("traceparent", "none")) for record in frames()] == [
        ("with", trace),
        ("without", "none"),
        ("without", "none"),
    ]


def test_records_that_nobody_reads_are_dropped_and_counted_once(
    frames: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As frames: what waits is bounded, here and among the replies, and what is read then is whole and in order."""
    reading, writing = os.pipe()
    writer = FrameWriter(writing, lambda _why: None)

    def send(*record: Any) -> None:
        writer.wait_for_room(lambda: False)
        writer.send([messages.encode_log(*record)])

    handler = ours()
    monkeypatch.setattr(handler, "_write", send)
    count, text = 4000, "x" * 5000
    for number in range(count):
        logging.getLogger("host").warning("%d %s", number, text)
    # Some are in the pipe; 20 MB were logged.
    kept = handler._items.qsize() * len(text)
    assert kept <= peer_log.MAX_WAITING_BYTES and writer._waiting_bytes < HIGH_WATER_BYTES + 2 * len(text)
    decoder, numbers, dropped = FrameDecoder(1 << 20), [], []
    while not dropped:
        for payload in decoder.feed(os.read(reading, 1 << 20)):
            record = json.loads(payload)["log"]  # type: ignore[arg-type]  # none is too large
            (dropped if record["logger"] == "dspy_bridge" else numbers).append(record["message"].split()[0])
    # Some may be dropped before the writer has taken what it can.
    assert numbers == sorted(set(numbers), key=int)
    assert len(numbers) + int(dropped[0]) == count and int(dropped[0]) > count / 2
    os.close(writing)
    os.close(reading)


def test_a_finalizer_may_log_within_any_lock_of_the_writer(frames: Callable[[], list[Any]]) -> None:
    writer = FrameWriter(os.open(os.devnull, os.O_WRONLY), lambda _why: None)
    handler = ours()

    class Loud:
        def __del__(self) -> None:
            logging.getLogger("host").warning("gone")

    def work() -> None:
        with writer._lock, handler.lock:
            Loud()

    handler._send = lambda *record: writer.send([messages.encode_log(*record)])
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
