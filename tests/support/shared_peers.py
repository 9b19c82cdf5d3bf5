"""Peers that several tests use, one after the other. Most of a peer's time goes into its import of DSPy."""

from __future__ import annotations

import itertools
import os
import select
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import reacts
from lm_server import KEY
from peer import Peer

# Each takes some 90 MB, and 200 MB once it has imported LiteLLM.
MOST = 5
# A peer that is busy for so many seconds is not used again.
MOMENT = 0.5
# Those used longest ago first.
_idle: dict[Any, Peer] = {}
_uses: Counter[Any] = Counter()


@contextmanager
def shared_peer(*flags: str, env: dict[str, str] | None = None) -> Iterator[Peer]:
    """A peer with these settings and without programs: one that an earlier test left as good as new, else a fresh one.

    For tests that do not look at its log, cache, threads, descriptors or start.
    """
    settings = (flags, tuple(sorted({**reacts.env(), **(env or {})}.items())))
    _uses[settings] += 1
    peer = _idle.pop(settings, None) or Peer(*flags, env=env)
    try:
        yield peer
        reusable = _reset(peer)
    except BaseException:
        peer.__exit__()
        raise
    if not reusable:
        peer.__exit__()
        return
    # Of the others the one that the fewest tests use: those of one module do not end that of all.
    while len(_idle) >= MOST:
        _idle.pop(min(_idle, key=_uses.__getitem__)).__exit__()
    _idle[settings] = peer


def _reset(peer: Peer) -> bool:
    """Remove its programs and look through its log; whether it is idle, and owes nobody a frame."""
    if peer.process.poll() is not None or not peer.idle():
        return False
    peer.call("cleanup")
    # What was cancelled is over a moment after its reply.
    end = time.monotonic() + MOMENT
    while True:
        stats = peer.call("get_stats")["result"]
        if not (stats["in_flight"] or stats["queued"] or stats["threads"]["running"]):
            break
        if not peer.idle(0.01) or time.monotonic() > end:
            return False
    if not peer.idle():
        return False
    assert KEY not in _log(peer)
    peer.ids = itertools.count(1)
    return True


def _log(peer: Peer) -> str:
    """What it has logged since this was last called."""
    assert peer.process.stderr is not None
    log = b""
    while select.select([peer.process.stderr], [], [], 0)[0]:
        data = os.read(peer.process.stderr.fileno(), 1 << 16)
        if not data:
            break
        log += data
    return log.decode(errors="replace")


def close() -> None:
    """End those that are left; none has logged the LMs' key."""
    while _idle:
        _, peer = _idle.popitem()
        with peer:
            assert KEY not in peer.finish()[2]
