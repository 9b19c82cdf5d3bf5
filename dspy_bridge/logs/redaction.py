"""Removes secrets from error replies and log records.

A provider's error may echo the API key, whole or in part.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

MASK = "[redacted]"
_SECRET_NAME = re.compile(r"(key|token|secret|password|authorization|credential)s?$", re.IGNORECASE)
_HEADERS = frozenset(("headers", "extra_headers", "default_headers"))
# API keys recognised by their form, also where a provider shows only their ends (sk-ab***yz).
_LOOKS_SECRET = re.compile(r"\b(?:sk|pk|rk|gsk|xai)-[\w*.…-]{6,}|\bBearer\s+[\w.~+/=-]{6,}|\bAIza[\w-]{10,}")
# The user info of a URL: user and password, or a token.
_USER = re.compile(r"""(?<=://)[^\s/?#"'<>\\]+(?=@)""")
# Authentication schemes, which precede the key in a header.
_SCHEMES = frozenset(("bearer", "basic", "token", "apikey"))
# Shorter values are not taken for secrets, as removing them would hit ordinary words.
_SHORTEST = 6

# Bounded, as a client may send a new key with each call.
_MOST = 1000

# Those of the environment and the settings.
_kept: dict[str, None] = {}
# All others, least recently used first.
_known: OrderedDict[str, None] = OrderedDict()


def learn(options: object, *, for_good: bool = False) -> None:
    """Remember the secrets among `options`; `for_good`: never forget them."""
    remember(secrets(options), for_good=for_good)


def secrets(options: object) -> Iterator[str]:
    """The secrets among `options`, nested keyword arguments of an LM."""
    if isinstance(options, dict):
        for name, value in options.items():
            if isinstance(value, str) and names_secret(str(name)):
                yield value
                scheme, _, key = value.partition(" ")
                if scheme.lower() in _SCHEMES:
                    yield key.strip()
            yield from secrets(value)
    elif isinstance(options, list):
        for item in options:
            yield from secrets(item)
    elif isinstance(options, str) and "://" in options:
        from urllib.parse import unquote

        for user in _USER.findall(options):
            password = user.partition(":")[2]
            # A user name alone may be a word; it is redacted only before a host.
            yield from (user if password else f"{user}@", password, unquote(password))


def names_secret(name: str) -> bool:
    """Whether a string of this name is a secret."""
    return _SECRET_NAME.search(name) is not None


def without_secrets(value: Any) -> Any:
    """Keyword arguments of an LM (nested, plain) without secrets and headers."""
    if isinstance(value, dict):
        return {
            name: without_secrets(inner)
            for name, inner in value.items()
            # A number of such a name is a setting (max_tokens).
            if str(name).lower() not in _HEADERS
            and not (isinstance(inner, (str, bytes, dict, list)) and names_secret(str(name)))
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def redact(text: str) -> str:
    """`text` without the known secrets, and without what looks like one."""
    # The longest first, as one secret may contain another. A search for each takes 60 µs for a thousand keys in an
    # error's text. One expression of all of them takes up to 300, 0.7 s instead of 25 ms in 200 KB, and 35 ms to
    # compile for each new key.
    for secret in sorted((*_kept, *_known), key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, MASK)
    return _LOOKS_SECRET.sub(MASK, _USER.sub(MASK, text))


def remember(found: Iterable[str], *, for_good: bool = False) -> None:
    """Remember secrets. Those of each call are remembered again, so that the ones in use are not forgotten."""
    for secret in found:
        if len(secret) < _SHORTEST:
            continue
        if for_good:
            _kept[secret] = None
        else:
            try:
                _known.move_to_end(secret)
                continue
            except KeyError:
                _known[secret] = None
            while len(_known) > _MOST:
                _known.popitem(last=False)
