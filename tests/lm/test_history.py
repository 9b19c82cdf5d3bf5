"""The history of a run's LM calls: within its limit, in order, without secrets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_bridge.lm.metering.history import History
from dspy_bridge.logs import redaction


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def listed(kept: History) -> list[dict[str, Any]]:
    return json.loads(kept.json())


def test_calls_are_in_the_order_in_which_they_started() -> None:
    kept = History(10_000)
    first, second, third = kept.begin(), kept.begin(), kept.begin()
    kept.end(second, ask("b"), {"model": "m", "outputs": ["B"]})
    kept.end(first, ask("a"), {"model": "m", "outputs": ["A"]})
    assert listed(kept) == [
        {"model": "m", "outputs": ["A"], "messages": ask("a")},
        {"model": "m", "outputs": ["B"], "messages": ask("b")},
    ]
    kept.end(third, ask("c"), {"model": "m", "outputs": None})
    kept.end(first, ask("again"), {"model": "m", "outputs": ["late"]})
    assert [entry["messages"] for entry in listed(kept)] == [ask("a"), ask("b"), ask("c")]


def test_over_the_limit_the_oldest_calls_go() -> None:
    kept = History(1000)
    for number in range(60):
        kept.end(kept.begin(), ask("x" * 200), {"outputs": [str(number)]})
    omitted, *rest = listed(kept)
    assert omitted == {"omitted": 60 - len(rest)} and len(rest) == 3
    assert [entry["outputs"] for entry in rest] == [["57"], ["58"], ["59"]]


def test_a_call_that_is_too_long_has_no_messages() -> None:
    kept = History(1000)
    kept.end(kept.begin(), ask("long " * 400), {"outputs": ["short"]})
    assert listed(kept) == [{"outputs": ["short"], "messages": None}]


@given(
    most=st.integers(0, 3000),
    calls=st.lists(st.tuples(st.text(max_size=600), st.text(max_size=300), st.booleans()), max_size=30),
)
def test_it_is_never_longer_than_its_limit(most: int, calls: list[tuple[str, str, bool]]) -> None:
    """Save for the count of what is left out. Calls end in any order."""
    kept = History(most)
    late = []
    for asked, answered, wait in calls:
        entry = kept.begin()
        if wait:
            late.append((entry, asked, answered))
        else:
            kept.end(entry, ask(asked), {"outputs": [answered]})
        assert len(kept.json()) <= max(most, len(b'[{"omitted":1000000}]'))
    for entry, asked, answered in reversed(late):
        kept.end(entry, ask(asked), {"outputs": [answered]})
        assert len(kept.json()) <= max(most, len(b'[{"omitted":1000000}]'))
    found = listed(kept)
    omitted = found[0].get("omitted", 0) if found else 0
    assert omitted + len([entry for entry in found if "omitted" not in entry]) == len(calls)


def test_secrets_are_removed_everywhere() -> None:
    redaction.remember(["planted-4711"])
    kept = History(10_000)
    kept.end(
        kept.begin(),
        ask("my key planted-4711, and sk-abcdefgh12345"),
        {
            "outputs": [{"text": "planted-4711", "tool_calls": [{"planted-4711": "planted-4711"}]}],
            "error": "planted-4711",
        },
    )
    shown = kept.json().decode()
    assert "planted" not in shown and "abcdefgh" not in shown
    assert listed(kept)[0]["messages"] == ask("my key [redacted], and [redacted]")


@pytest.mark.parametrize("size", [100_000, 20_000_000])
def test_data_is_cut_short(size: int) -> None:
    """An image in base64, however large."""
    image = "iVBORw0KGgo" + "A" * size + "=="
    url = f"data:image/png;base64,{image}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    kept = History(1024)
    kept.end(kept.begin(), [{"role": "user", "content": content}], {"outputs": ["a cat"]})
    ((shown, text),) = [message["content"] for message in listed(kept)[0]["messages"]]
    assert shown["image_url"]["url"] == f"data:image/png;base64,…({len(image)} characters)"
    assert text["text"] == "What is it?"
