"""A peer that runs lists of inputs, its LM, and the client that answers for tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from conftest import lm_env
from lm_server import Answer, LMServer
from peer import Peer, until
from tool_host import answer

Tool = Callable[[dict[str, Any]], Any]
Answers = Callable[[dict[str, Any]], Answer]


def question(request: dict[str, Any]) -> str:
    """That of the run which asks the LM."""
    return str(request["messages"][-1]["content"]).split("[[ ## question ## ]]\n")[1].split("\n")[0]


def asks(*questions: str) -> list[dict[str, str]]:
    return [{"question": text} for text in questions]


class Desk:
    """`answer`: that of the LM. Of the latest `run`, `asked`: tool calls; `frames`: what else came before its reply."""

    def __init__(self, answer: Answers, slots: int = 8, **env: str) -> None:
        self.answer, self.slots = answer, slots
        self.server = LMServer(lambda request: self.answer(request))
        self.peer = Peer("--max-in-flight", str(slots), env={**lm_env(self.server), **env})

    def start(self, args: dict[str, Any], **envelope: Any) -> int:
        return self.peer.request("execute_program", {"program_id": "qa", **args}, **envelope)

    def run(self, args: dict[str, Any], tool: Tool | None = None, **envelope: Any) -> Any:
        """The reply. Tool calls are answered by `tool`."""
        id = self.start(args, **envelope)
        self.frames: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        while "success" not in (frame := self.peer.receive()):
            assert frame.get("id", id) == id
            if "tool_call" not in frame:
                self.frames.append(frame)
                continue
            self.asked.append(frame["tool_call"])
            self.tell(frame["tool_call"], tool)
        return frame

    def tell(self, call: dict[str, Any], tool: Tool | None) -> None:
        assert tool is not None
        answer(self.peer, call, {call["name"]: lambda **args: tool(args)})

    def becomes_idle(self) -> None:
        def idle() -> bool:
            stats = self.peer.call("get_stats")["result"]
            return (stats["in_flight"], stats["queued"]) == (0, 0)

        until(idle)


@contextmanager
def fresh(desk: Desk, answers: Answers) -> Iterator[Desk]:
    """A desk that other tests have used, with the program `qa`, whose LM answers like this."""
    desk.answer = answers
    # What another test cancelled may reach the server only now.
    assert desk.server.becomes_idle(10)
    desk.server.serve(lambda request: desk.answer(request))
    id = desk.peer.request("create_program", {"id": "qa", "signature": "question -> answer"})
    while desk.peer.receive().get("id") != id:
        pass  # left over by a test that failed
    yield desk
    desk.server.gate.set()
    desk.becomes_idle()
