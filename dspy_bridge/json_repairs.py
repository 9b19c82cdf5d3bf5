"""What DSPy may have repaired of JSON that an LM wrote. Imports `json_repair`, which DSPy reads such text with.

Repairing takes the square of the length where much is opened and not closed: 64 KB of `["` held the event loop for
minutes. Text that is JSON takes no repair and has no limit; other text is refused where it could take longer than a
fraction of a second.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import json_repair

_OPENINGS = "{[("
# Openings times characters: 0.3 s for `["` a thousand times over.
_MOST_WORK = 4_000_000


class TooMuchToRepair(ValueError):
    """Broken JSON that would take too long to repair."""

    def __init__(self) -> None:
        super().__init__("expected JSON, got text that opens too many objects and lists to be repaired")


@functools.cache
def install() -> None:
    """Limit `json_repair.loads`, once in a process. Raises `AttributeError` where there is no such function."""
    loads = json_repair.loads

    @functools.wraps(loads)
    def limited(json_str: Any = "", *args: Any, **options: Any) -> Any:
        return first_value(json_str) if is_long(json_str) else loads(json_str, *args, **options)

    json_repair.loads = limited


def is_long(text: Any) -> bool:
    """Whether to repair it could take too long."""
    return isinstance(text, str) and len(text) * sum(map(text.count, _OPENINGS)) > _MOST_WORK


def first_value(text: str) -> Any:
    """The first object or list in a text, which is left as it is otherwise. Raises `TooMuchToRepair`."""
    start = min((at for at in map(text.find, "{[") if at >= 0), default=0)
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        raise TooMuchToRepair from None
