"""Secrets are cut out of every text that leaves the peer: replies and log records.

A provider's error may echo the key that it was sent, whole or in part, and an exception's text ends in both.
"""

from __future__ import annotations

import os
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MASK = "[redacted]"
_SECRET_NAME = re.compile(r"(key|token|secret|password|authorization|credential)s?$", re.IGNORECASE)
_HEADERS = frozenset(("headers", "extra_headers", "default_headers"))
# Keys that are known by their look, also where a provider shows only their ends (sk-ab***yz).
_LOOKS_SECRET = re.compile(r"\b(?:sk|pk|rk|gsk|xai)-[\w*.…-]{6,}|\bBearer\s+[\w.~+/=-]{6,}|\bAIza[\w-]{10,}")
# Shorter values are no secrets, and cutting them out would hit ordinary words.
_SHORTEST = 6

# A host that gives each call a key of its own must not make the peer grow.
_MOST = 1000

_known: dict[str, None] = {}


def learn(options: object) -> None:
    """Remember the secrets among `options` (nested keyword arguments of an LM)."""
    if isinstance(options, dict):
        for name, value in options.items():
            if isinstance(value, str) and names_secret(str(name)):
                _remember(value)
            else:
                learn(value)
    elif isinstance(options, list):
        for item in options:
            learn(item)


def names_secret(name: str) -> bool:
    """Whether what has this name is secret, if it is a text."""
    return _SECRET_NAME.search(name) is not None


def without_secrets(value: Any) -> Any:
    """Keyword arguments of an LM (nested, plain) without any secret, and without headers, which may hold any."""
    if isinstance(value, dict):
        return {
            name: without_secrets(inner)
            for name, inner in value.items()
            # A number under such a name is a setting: max_tokens.
            if str(name).lower() not in _HEADERS
            and not (isinstance(inner, (str, bytes, dict, list)) and names_secret(str(name)))
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def learn_environment() -> None:
    """Remember the secrets in the environment: values of `OPENAI_API_KEY`, `HF_TOKEN` and their like."""
    learn(dict(os.environ))


def redact(text: str) -> str:
    """`text` without any secret that is known or looks like one."""
    for secret in tuple(_known):
        if secret in text:
            text = text.replace(secret, MASK)
    return _LOOKS_SECRET.sub(MASK, text)


def _remember(secret: str) -> None:
    if len(secret) >= _SHORTEST:
        _known[secret] = None
        if len(_known) > _MOST:
            _known.pop(next(iter(_known)), None)
