"""logs: one way out for all records, and no prompts at debug level."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from dspy_bridge import logs, tracing

NAMES = ("", "LiteLLM", "dspy", "httpx", "host")


@pytest.fixture
def frames() -> Iterator[list[Any]]:
    """What is logged, at debug level; everything is put back afterwards."""
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(logger.level, list(logger.handlers), list(logger.filters), logger.propagate) for logger in loggers]
    for handler in list(loggers[0].handlers):
        loggers[0].removeHandler(handler)
    sent: list[Any] = []
    logs.setup("debug", lambda payloads: sent.extend(json.loads(payload)["log"] for payload in payloads))
    yield sent
    logging.captureWarnings(False)
    for logger, (level, handlers, filters, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:], logger.propagate = handlers, filters, propagate


def test_a_library_that_brings_its_own_handler_later_is_heard_once(
    frames: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("LiteLLM")
    library.addHandler(logging.StreamHandler())
    library.warning("with a key: sk-1234567890")
    assert frames == [{"level": "warning", "logger": "LiteLLM", "message": "with a key: [redacted]"}]
    assert capsys.readouterr().err == ""


def test_debug_is_for_the_peer_and_the_host_not_for_what_tells_prompts(frames: list[Any]) -> None:
    for name in ("LiteLLM", "dspy", "dspy.clients.cache", "httpx", "host", "dspy_bridge"):
        logging.getLogger(name).debug("prompt")
    assert [record["logger"] for record in frames] == ["host", "dspy_bridge"]


def test_that_a_call_is_made_is_no_news(frames: list[Any]) -> None:
    """LiteLLM tells of each at info."""
    for name in ("LiteLLM", "LiteLLM Router", "host"):
        logging.getLogger(name).info("completion()")
    assert [record["logger"] for record in frames] == ["host"]


def test_a_record_has_the_trace_of_the_request_that_it_was_made_for(frames: list[Any]) -> None:
    """Also those that take another way out."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for name in ("host", "LiteLLM"):
        tracing.context(trace).run(logging.getLogger(name).error, "with")
        tracing.context(None).run(logging.getLogger(name).error, "without")
        logging.getLogger(name).error("without")
    assert [(record["message"], record.get("traceparent", "none")) for record in frames] == [
        ("with", trace), ("without", "none"), ("without", "none")
    ] * 2  # fmt: skip


def test_a_second_setup_changes_nothing(frames: list[Any]) -> None:
    logs.setup("error", None)
    logging.getLogger("host").info("once")
    assert len(frames) == 1
