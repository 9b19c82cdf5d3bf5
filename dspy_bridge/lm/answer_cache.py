"""Answers in DSPy's cache are found by those alone who may have them. Imports DSPy.

DSPy leaves the server and the key of an LM out of the cache's key: another account, or another server's model of the
same name, would get the answer.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import dspy

from dspy_bridge.lm import dspy_internals, lm_call, servers


def configure(*, disk_cache: str | None, entries: int) -> None:
    """Replace DSPy's cache. `disk_cache`: a folder; `entries`: of the cache in memory; without both there is none."""
    separable = dspy_internals.CACHE_KEY.there
    dspy.configure_cache(
        enable_disk_cache=disk_cache is not None and separable,
        disk_cache_dir=disk_cache,
        enable_memory_cache=entries > 0 and separable,
        memory_max_entries=max(1, entries),
        # Files in the folder are data: DSPy's default would run any pickle found there.
        restrict_pickle=True,
    )
    if separable:
        dspy.cache.cache_key = _separating(dspy.cache.cache_key)


def _separating(cache_key: Any) -> Any:
    def key(request: dict[str, Any], ignored_args_for_cache_key: list[str] | None = None) -> str:
        target = lm_call.target()
        # An LM of your application's is known by what is in the request alone.
        account = servers.account(request) if target is None else repr((target.account, target.scope))
        return sha256(f"{cache_key(request, ignored_args_for_cache_key)} {account}".encode()).hexdigest()

    return key
