"""get_stats: the versions of the installed packages."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from dspy_bridge.commands.handlers import Commands
from dspy_bridge.settings import load


def test_what_is_installed_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look-up took 2 ms of the thread that answers pings; nothing is looked up before the first request."""
    asked = []
    version = metadata.version

    def counted(name: str) -> str:
        asked.append(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", counted)
    commands = Commands(load({}, {}), lambda: None, dict)
    call: Any = None
    assert asked == []
    replies = [commands.get_stats({}, call) for _ in range(3)]
    assert replies[0]["versions"] == replies[2]["versions"] and {"dspy", "psutil"} <= replies[0]["versions"].keys()
    assert sorted(asked) == ["dspy", "psutil"]
