"""`cast`, the one function of this module that is safe from a thread."""

from __future__ import annotations

import queue
from typing import Any

from . import erlterms

# `(pid, message)` as Erlang would receive them.
mailbox: queue.Queue[tuple[Any, Any]] = queue.Queue()


def cast(pid: Any, message: Any) -> None:
    """Encodes on the caller's thread. As the real one: what cannot be sent to raises."""
    if not isinstance(pid, (erlterms.OpaqueObject, erlterms.Atom)):
        raise ValueError("unsupported data type")
    mailbox.put((pid, erlterms.encode(message)))
