"""The caller of a run that has tools: it answers the peer's tool calls meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peer import PATIENCE, Peer

Tools = Mapping[str, Callable[..., Any]]


class ToolError(Exception):
    """A tool's failure, as the caller reports it."""


def execute(
    peer: Peer, args: dict[str, Any], tools: Tools, **envelope: Any
) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The reply of a run, and the tool calls before it; it must be the only open request."""
    id = peer.request("execute_program", args, **envelope)
    asked = []
    while "tool_call" in (frame := peer.receive(PATIENCE)):
        assert frame["id"] == id
        call = frame["tool_call"]
        asked.append((call["name"], call["args"]))
        answer(peer, call, tools)
    assert frame["id"] == id
    return frame, asked


def answer(peer: Peer, call: dict[str, Any], tools: Tools) -> None:
    """Answer one tool call."""
    try:
        result = {"success": True, "result": tools[call["name"]](**call["args"])}
    except ToolError as error:
        result = {"success": False, "error": str(error)}
    peer.send({"tool_result": {"call_id": call["call_id"], **result}})
