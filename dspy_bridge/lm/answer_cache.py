"""Answers in DSPy's cache are found by those alone who may have them. Imports DSPy."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import dspy

from dspy_bridge.lm import lm_call
from dspy_bridge.lm.transport import routes


def configure(*, disk_cache: str | None, entries: int) -> None:
    """Replace DSPy's cache. `disk_cache`: a folder; `entries`: of the cache in memory; without both there is none."""
    dspy.cache = _Cache(
        enable_disk_cache=disk_cache is not None,
        enable_memory_cache=entries > 0,
        disk_cache_dir=disk_cache,
        disk_size_limit_bytes=dspy.clients.DISK_CACHE_LIMIT,
        memory_max_entries=max(1, entries),
        # Files in the folder are data: DSPy's default would run any pickle found there.
        restrict_pickle=True,
    )


class _Cache(dspy.clients.Cache):  # type: ignore[misc]  # DSPy ships no types
    """DSPy leaves the server and the key of an LM out of the cache's key: another account, or another server's model of
    the same name, would get the answer."""

    def cache_key(self, request: dict[str, Any], ignored_args_for_cache_key: list[str] | None = None) -> str:
        target = lm_call.target()
        # An LM of your application's is known by what is in the request alone.
        account = routes.account(request) if target is None else repr((target.account, target.scope))
        return sha256(f"{super().cache_key(request, ignored_args_for_cache_key)} {account}".encode()).hexdigest()

    def get(self, *args: Any, **options: Any) -> Any:
        found, call = super().get(*args, **options), lm_call.current.get()
        if call is not None:
            call.cached = found is not None
        return found
