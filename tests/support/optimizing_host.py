"""A client that has programs optimized: a peer, its LM, and the client's tools, answered one by one."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from conftest import lm_env
from lm_server import Answer, LMServer
from optimizing_lm import QUESTIONS, answer, expected
from peer import PATIENCE, Peer
from tool_host import ToolError, Tools
from tool_host import answer as answer_tool

# Small runs of each: the options, and what else it needs.
SMALL: dict[str, dict[str, Any]] = {
    "labeled_few_shot": {"k": 3},
    "bootstrap_few_shot": {"max_bootstrapped_demos": 2, "max_labeled_demos": 3},
    "random_search": {"max_bootstrapped_demos": 2, "max_labeled_demos": 2, "num_candidate_programs": 2},
    "copro": {"breadth": 3, "depth": 2},
    "mipro_v2": {
        "auto": None,
        "num_candidates": 3,
        "num_trials": 3,
        "minibatch": False,
        "max_bootstrapped_demos": 2,
        "max_labeled_demos": 2,
    },
    "simba": {"bsize": 6, "num_candidates": 2, "max_steps": 2, "max_demos": 2},
    "gepa": {"max_metric_calls": 40, "reflection_minibatch_size": 3},
}
# Those whose code in DSPy differs most; `make test-optimizers` takes all that score.
EVERY = os.environ.get("EVERY_OPTIMIZER") == "1"
SCORING = [name for name in SMALL if name != "labeled_few_shot"] if EVERY else ["mipro_v2", "gepa"]


def first_of(*wanted: str) -> list[str]:
    """Optimizers for a test: the first for `make test`, all for `make test-optimizers`."""
    return list(wanted if EVERY else wanted[:1])


EXACT = {"field": "answer", "match": "exact_match"}
JUDGE = {"tool": "judge"}


def lm_answer(request: dict[str, Any]) -> Answer:
    """That of `optimizing_lm`."""
    return answer(request["messages"], request.get("temperature"))


def right(example: dict[str, Any], prediction: dict[str, Any], **_: Any) -> bool:
    """A metric."""
    return bool(prediction["answer"] == example["answer"])


def is_reply(frame: dict[str, Any]) -> bool:
    """Whether it is the last one of its request."""
    return "success" in frame


class Desk:
    """`server`: the LM. `asked`: the tool calls of the latest `run`; `items`: of its stream."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None, lm: dict[str, Any] | None = None) -> None:
        self.server = LMServer(lm_answer)
        self.flags, self.env = flags, {**lm_env(self.server, **(lm or {})), **(env or {})}
        self.peer = Peer(*flags, env=self.env)
        # Replies that came before they were asked for.
        self._early: dict[Any, dict[str, Any]] = {}
        self.forget()

    def forget(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.items: list[dict[str, Any]] = []

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.__exit__()
        self.server.stop()

    def serve(self, answer: Callable[[dict[str, Any]], Answer] = lm_answer, held_after: int | None = None) -> None:
        """Let the LM answer like this, and from the request of that number on not at all; its counts begin anew."""
        lock, count = threading.Lock(), itertools.count(1)

        def counted(request: dict[str, Any]) -> Answer:
            with lock:
                number = next(count)
            if held_after is not None and number == held_after:
                gate.clear()
            return answer(request)

        # What was held and then given up would be counted as one of the next, and answered like it.
        assert self.server.becomes_idle(PATIENCE)
        self.server.serve(counted)
        gate = self.server.gate

    def lm_holds(self, number: int) -> None:
        """Wait until the LM has so many requests."""
        for _ in range(number):
            assert self.server.arrived.acquire(timeout=PATIENCE)

    def restart(self) -> None:
        """Kill the peer, and start another one with the same settings."""
        self.peer.__exit__()
        self._early.clear()
        self.peer = Peer(*self.flags, env=self.env)

    def create(self, id: str = "qa", signature: Any = "question -> answer", **definition: Any) -> None:
        id_of_request = self.peer.request("create_program", {"id": id, "signature": signature, **definition})
        reply = self.reply_to(id_of_request)
        assert reply["success"], reply

    def args(
        self,
        optimizer: str,
        metric: dict[str, Any] = EXACT,
        *,
        inputs: list[Any] | None = None,
        wanted: list[Any] | None = None,
        options: dict[str, Any] | None = None,
        program_id: str = "qa",
        **optimize: Any,
    ) -> dict[str, Any]:
        """The arguments of a small optimization."""
        if inputs is None:
            inputs = [{"question": asked} for asked in QUESTIONS]
            wanted = [{"answer": expected(asked)} for asked in QUESTIONS] if wanted is None else wanted
        if optimizer == "gepa":
            optimize.setdefault("reflection_lm", {"model": "openai/reflection", **self.server.options()})
        optimize = {"num_threads": 4, **optimize}
        return {
            "program_id": program_id,
            "inputs": inputs,
            **({} if wanted is None else {"expected": wanted}),
            "metric": metric,
            "optimize": {"optimizer": optimizer, "options": {**SMALL[optimizer], **(options or {})}, **optimize},
        }

    def start(self, optimizer: str, metric: dict[str, Any] = EXACT, **more: Any) -> int:
        envelope = {name: more.pop(name) for name in ("stream", "meta", "timeout_ms") if name in more}
        self.forget()
        return self.peer.request("execute_program", self.args(optimizer, metric, **more), **envelope)

    def run(self, optimizer: str, metric: dict[str, Any] = EXACT, tools: Tools | None = None, **more: Any) -> Any:
        """The reply of a small optimization."""
        return self.reply_to(self.start(optimizer, metric, **more), tools)

    def reply_to(
        self, id: int, tools: Tools | None = None, until: Callable[[dict[str, Any]], bool] = is_reply
    ) -> dict[str, Any]:
        """The first frame of the request for which `until` holds; tool calls meanwhile are answered."""
        while True:
            frame = self._early.pop(id, None) or self.peer.receive(PATIENCE)
            if frame.get("id") == id and until(frame):
                return frame
            if "tool_call" in frame:
                self.asked.append(frame["tool_call"])
                answer_tool(self.peer, frame["tool_call"], tools or {"judge": right})
            elif "stream" in frame:
                self.items.append(frame["stream"])
            else:
                assert frame["id"] != id, frame
                self._early[frame["id"]] = frame

    def execute(self, question: str = "word 1", program_id: str = "qa", **more: Any) -> Any:
        """The reply of another run to its end; no other request is open."""
        args = {"program_id": program_id, "inputs": {"question": question}}
        return self.reply_to(self.peer.request("execute_program", args, **more))

    def stats(self) -> Any:
        return self.reply_to(self.peer.request("get_stats"))["result"]

    def becomes_idle(self) -> dict[str, Any]:
        """Wait until nothing runs any more; the counts then."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            stats = self.stats()
            threads = stats["threads"]
            if not (stats["in_flight"] or stats["queued"] or threads["running"] or threads["abandoned"]):
                return dict(stats)
        raise AssertionError(stats)

    def nothing_follows(self, most: int | None = None) -> None:
        """No thread, tool call or LM request of an optimization that has ended, which has made at most `most`."""
        self.becomes_idle()
        self.server.gate.set()
        calls = len(self.asked)
        # The LM may come late to what was sent before the end.
        for turn in range(10):
            asked = len(self.server.requests)
            self.execute()
            if turn > 1 and len(self.server.requests) == asked + 1:
                break
        assert len(self.server.requests) == asked + 1
        assert most is None or asked <= most + 2, asked
        assert self.peer.idle() and not self._early, self._early
        assert len(self.asked) == calls


def fails(**_: Any) -> Any:
    """A metric."""
    raise ToolError("the metric broke")
