"""Exceptions to what a reply says of them. Here, and nowhere else, do exceptions become errors of the protocol."""

from __future__ import annotations

from dspy_bridge.errors import BridgeError
from dspy_bridge.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# An error's text is one line of at most this many characters.
MAX_ERROR_CHARS = 2000
# Before it is cut to that it is redacted, and before that cut to this: half a secret is not known as one.
_MOST_REDACTED = 10 * MAX_ERROR_CHARS


def describe(error: BaseException, log_exception: Callable[[BaseException], str]) -> dict[str, Any]:
    """`{"success": False, "error", "error_type"}`. `log_exception` logs an exception and returns its reference."""
    if isinstance(error, BridgeError):
        text = str(error)
        if not error.exact:
            # The first ping would wait for its expressions.
            from dspy_bridge.logs import redaction

            text = one_line(redaction.redact(one_line(text, _MOST_REDACTED)))
        return messages.failure(error.error_type, text, error.retryable)
    # A defect, ours or of user code. Its text may hold contents, so it goes to the log alone.
    reference = log_exception(error)
    text = f"{type(error).__name__} in the peer; its log has the traceback under {reference}"
    return messages.failure("internal", text)


def one_line(text: str, most: int = MAX_ERROR_CHARS) -> str:
    """`text` without line breaks, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
