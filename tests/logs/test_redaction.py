"""redaction: secrets that are known, or look like one, are cut out of any text."""

from __future__ import annotations

import os

import pytest

from dspy_bridge.logs import redaction


def test_secrets_among_options_are_learned_at_any_depth() -> None:
    redaction.learn({"api_key": "k-123456789", "extra": [{"headers": {"X-Token": "t-123456789"}}], "model": "openai/x"})
    assert redaction.redact("k-123456789 t-123456789 openai/x") == "[redacted] [redacted] openai/x"


def test_secrets_of_the_environment_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "v-123456789")
    monkeypatch.setenv("SOME_PATH", "/not/secret")
    redaction.learn(dict(os.environ), for_good=True)
    assert redaction.redact("v-123456789 /not/secret") == "[redacted] /not/secret"


@pytest.mark.parametrize(
    "text", ["sk-abcdef123456", "sk-ab***yz99", "Bearer abc.def-123", "AIzaSyA1234567890", "gsk-123456"]
)
def test_what_looks_like_a_key_is_cut_out(text: str) -> None:
    assert redaction.redact(f"Incorrect key: {text}!").startswith("Incorrect key: [redacted]")


@pytest.mark.parametrize("text", ["task-oriented answers", "the bearer of news", "max_tokens=5", "a short sk-1"])
def test_ordinary_words_stay(text: str) -> None:
    assert redaction.redact(text) == text


def test_what_is_remembered_is_bounded() -> None:
    for number in range(3000):
        redaction.learn({"api_key": f"bounded-{number}"})
    assert len(redaction._known) <= 1000
    assert redaction.redact("bounded-2999") == "[redacted]"


def learn_many(number: int = 3000) -> None:
    for n in range(number):
        redaction.learn({"api_key": f"one-of-many-{n}"})


def test_keys_of_the_environment_and_of_the_settings_are_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIN_API_KEY", "of-the-environment-1")
    redaction.learn(dict(os.environ), for_good=True)
    redaction.learn({"api_key": "of-the-settings-1", "extra_headers": {"x-api-key": "header-1234567"}}, for_good=True)
    learn_many()
    assert redaction.redact("of-the-environment-1 of-the-settings-1 header-1234567") == " ".join(["[redacted]"] * 3)


def test_a_key_that_is_learned_again_is_not_the_next_to_be_forgotten() -> None:
    redaction.learn({"api_key": "in-daily-use"})
    for _ in range(5):
        learn_many(900)
        redaction.learn({"api_key": "in-daily-use"})
    learn_many(900)
    assert redaction.redact("in-daily-use") == "[redacted]"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Basic", "Token", "ApiKey"])
def test_a_key_with_its_scheme_is_known_without_it(scheme: str) -> None:
    key = f"alone-{scheme}-123"
    redaction.learn({"extra_headers": {"Authorization": f"{scheme}  {key}"}})
    assert redaction.redact(f"invalid: {key} ({scheme}  {key})") == "invalid: [redacted] ([redacted])"
    assert redaction.redact(scheme) == scheme, "it is a word"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("http://user:pass@host:80/v1", "http://[redacted]@host:80/v1"),
        ("tried 'https://token@host/v1', failed", "tried 'https://[redacted]@host/v1', failed"),
        ("https://us%40er:p@ss:w@host?q=a@b", "https://[redacted]@host?q=a@b"),
        ("redis://:pass@host", "redis://[redacted]@host"),
        ("https://host/@name a@b.c", "https://host/@name a@b.c"),
        ("http://host?mail=a@b", "http://host?mail=a@b"),
        ('{"url":"http://host","mail":"a@b"}', '{"url":"http://host","mail":"a@b"}'),
    ],
)
def test_whoever_an_address_names_is_cut_out_of_it(text: str, redacted: str) -> None:
    assert redaction.redact(text) == redacted


def test_the_password_of_an_address_is_known_alone() -> None:
    redaction.learn({"api_base": "http://user:pa%24%24word@host/v1", "base_url": "http://[", "proxy": "https://a:b@c"})
    assert redaction.redact("pa%24%24word, pa$$word, user") == "[redacted], [redacted], user"
    redaction.learn({"api_base": "http://gateway-token@host/v1"})
    assert redaction.redact("gateway-token@host, a gateway-token") == "[redacted]host, a gateway-token"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("text", ["://", "://a:", "a:", "Bearer ", "sk-", "AIza", "sk-*", "@"])
@pytest.mark.slow
def test_a_long_text_is_redacted_in_linear_time(text: str) -> None:
    redaction.redact(text * (2_000_000 // len(text)))
    redaction.redact("://" + text.strip(":/") * (2_000_000 // len(text)))
