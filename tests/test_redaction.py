"""redaction: secrets that are known, or look like one, are cut out of any text."""

from __future__ import annotations

import pytest

from dspy_bridge import redaction


def test_secrets_among_options_are_learned_at_any_depth() -> None:
    redaction.learn({"api_key": "k-123456789", "extra": [{"headers": {"X-Token": "t-123456789"}}], "model": "openai/x"})
    assert redaction.redact("k-123456789 t-123456789 openai/x") == "[redacted] [redacted] openai/x"


def test_secrets_of_the_environment_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "v-123456789")
    monkeypatch.setenv("SOME_PATH", "/not/secret")
    redaction.learn_environment()
    assert redaction.redact("v-123456789 /not/secret") == "[redacted] /not/secret"


@pytest.mark.parametrize(
    "text", ["sk-abcdef123456", "sk-ab***yz99", "Bearer abc.def-123", "AIzaSyA1234567890", "gsk-123456"]
)
def test_what_looks_like_a_key_is_cut_out(text: str) -> None:
    assert redaction.redact(f"Incorrect key: {text}!").startswith("Incorrect key: [redacted]")


@pytest.mark.parametrize("text", ["task-oriented answers", "the bearer of news", "max_tokens=5", "a short sk-1"])
def test_ordinary_words_stay(text: str) -> None:
    assert redaction.redact(text) == text


def test_values_too_short_to_be_secrets_are_not_learned() -> None:
    redaction.learn({"api_key": "x"})
    assert redaction.redact("x marks it") == "x marks it"


def test_what_is_remembered_is_bounded() -> None:
    for number in range(3000):
        redaction.learn({"api_key": f"bounded-{number}"})
    assert len(redaction._known) <= 1000
    assert redaction.redact("bounded-2999") == "[redacted]"
