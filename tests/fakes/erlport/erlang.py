"""The Erlang side of an instance, as far as `cast`, the one function that is safe from a thread, gets to see it."""

from __future__ import annotations

import queue
from typing import Any

from . import erlterms

# `(receiver, message)` as Erlang would receive them.
mailbox: queue.Queue[tuple[Any, Any]] = queue.Queue()
# Why the instance has ended; empty as long as it has not.
ended: list[str] = []


def cast(pid: Any, message: Any) -> None:
    """Encodes on the caller's thread; returns before Erlang has looked at it."""
    receiver, term = erlterms.encode(pid), erlterms.encode(message)
    if ended:
        raise EOFError
    if _takes_messages(receiver):
        mailbox.put((receiver, term))
    else:
        ended.append(f"send_error, badarg: {receiver!r}")


def _takes_messages(receiver: Any) -> bool:
    """Whether `receiver ! Message` raises nothing. No process has a registered name here."""
    if isinstance(receiver, tuple):
        return len(receiver) == 2 and all(isinstance(part, str) for part in receiver)
    opaque = erlterms.Opaque
    kinds = (opaque.PID, opaque.OLD_PID, opaque.REFERENCE, opaque.OLD_REFERENCE, opaque.PORT)
    return isinstance(receiver, erlterms.Opaque) and receiver.encoding[:1] in kinds
