"""Programs with a state: Python's optimized programs are served here, and states from here load in Python."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from conftest import lm_env
from lm_server import LMServer, chat
from peer import Peer

pytestmark = pytest.mark.filterwarnings("ignore:The 'prefix' argument:DeprecationWarning")


class Served:
    """A peer, its LM, and its folder for states."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "states"
        self.folder.mkdir()
        self.answer = chat(answer="Paris", reasoning="r", rationale="r", topic="t")
        self.server = LMServer(lambda _request: self.answer)
        env = {
            "DSPY_BRIDGE_STATE_DIR": str(self.folder),
            "OPENAI_API_KEY": "sk-environment-012345",
            "OPENAI_BASE_URL": self.server.url,
            "OPENAI_API_BASE": self.server.url,
        }
        self.peer = Peer(env={**lm_env(self.server), **env})
        self._ids = itertools.count()

    def create(self, program_type: str = "predict", **args: Any) -> dict[str, Any]:
        id = f"p{next(self._ids)}"
        args = {"id": id, "signature": "question -> answer", "program_type": program_type, **args}
        return {**self.peer.call("create_program", args), "program": id}

    def created(self, program_type: str = "predict", **args: Any) -> str:
        reply = self.create(program_type, **args)
        assert reply["success"], reply
        return str(reply["program"])

    def state(self, program: str) -> dict[str, Any]:
        (details,) = self.peer.call("list_programs", {"program_ids": [program], "state": True})["result"]["details"]
        assert details["id"] == program
        return dict(details["state"])

    def prompts(self, program: str, **args: Any) -> list[Any]:
        """The prompt of one run."""
        begin = len(self.server.requests)
        inputs = args.pop("inputs", {"question": "Where?"})
        reply = self.peer.call("execute_program", {"program_id": program, "inputs": inputs, **args})
        assert reply["success"], reply
        return [request["messages"] for request in self.server.requests[begin:]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("host"))
    with served.peer:
        yield served
    served.server.stop()


def saved(module: dspy.Module, path: Path) -> dict[str, Any]:
    module.save(path)
    return dict(json.loads(path.read_bytes()))


TOOL = {"name": "search", "description": "looks up", "args": {"query": {"type": "str"}}}


def search(query: str) -> str:
    """looks up"""
    return query


QA = "question -> answer"
REWARD = {"field": "answer", "equals": "Paris"}
# What the peer is asked for, and the same in Python.
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "predict": ({}, lambda: dspy.Predict(QA)),
    "chain_of_thought": ({}, lambda: dspy.ChainOfThought(QA)),
    "react": ({"tools": [TOOL]}, lambda: dspy.ReAct(QA, tools=[search])),
    "best_of_n": (
        {"options": {"N": 1, "threshold": 1.0, "reward": REWARD}},
        lambda: dspy.BestOfN(dspy.Predict(QA), N=1, reward_fn=lambda *_: 1.0, threshold=1.0),
    ),
    "refine": (
        {"options": {"N": 1, "threshold": 1.0, "reward": REWARD}},
        lambda: dspy.Refine(dspy.Predict(QA), N=1, reward_fn=lambda inputs, prediction: 1.0, threshold=1.0),
    ),
    "multi_chain_comparison": ({"options": {"M": 2}}, lambda: dspy.MultiChainComparison(QA, M=2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_program_is_served_and_given_back(served: Served, kind: str, tmp_path: Path) -> None:
    """By path and by value; prompts have its demos and instructions."""
    args, make = KINDS[kind]
    module = make()
    for predictor in module.predictors():
        predictor.signature = predictor.signature.with_instructions("Learned to be brief.")
        demo = {name: f"demo of {name}" for name in predictor.signature.fields}
        if "next_tool_args" in demo:
            demo |= {"next_tool_name": "finish", "next_tool_args": {}}
        predictor.demos = [dspy.Example(augmented=True, **demo)]
    state = saved(module, served.folder / f"{kind}.json")
    served.answer = chat(
        answer="Paris", reasoning="r", rationale="r", next_thought="t", next_tool_name="finish", next_tool_args="{}"
    )
    inputs: dict[str, Any] = {"question": "Where?"}
    if kind == "multi_chain_comparison":
        inputs["completions"] = [{"reasoning": "r", "answer": "Paris"}] * 2
    programs = [served.created(kind, state_path=f"{kind}.json", **args), served.created(kind, state=state, **args)]
    assert served.state(programs[0]) == served.state(programs[1]) == state
    programs.append(served.created(kind, state=served.state(programs[1]), **args))
    first, *others = [served.prompts(program, inputs=inputs) for program in programs]
    assert others == [first, first]
    assert "Learned to be brief." in str(first) and "demo of answer" in str(first)
    # BestOfN wants a trace; other tests of this process may have set it to None, as the peer does.
    with dspy.context(lm=dspy.LM("openai/stub-model", **served.server.options()), trace=[]):
        begin = len(served.server.requests)
        module(**inputs)
        assert [request["messages"] for request in served.server.requests[begin:]] == first


def test_the_lm_that_a_program_was_saved_with_is_its_lm(served: Served, tmp_path: Path) -> None:
    """Unless the program or a call has `lm`. Its key and address are those of the peer's LM, of the same provider."""
    elsewhere = {"api_base": "http://127.0.0.1:9/v1", "api_key": "sk-saved-0123456789"}
    module = dspy.Predict(QA)
    module.set_lm(dspy.LM("openai/saved-model", temperature=0.25, max_tokens=99, cache=False, **elsewhere))
    state = saved(module, tmp_path / "state.json")
    state["lm"] |= elsewhere
    program = served.created(state=state)
    given = served.created(state=state, lm={"model": "openai/given", **served.server.options()})
    served.prompts(program)
    served.prompts(given)
    served.prompts(program, lm={"model": "openai/call", **served.server.options()})
    first, second, third = served.server.requests[-3:]
    assert (first["model"], first["temperature"], first["max_completion_tokens"]) == ("saved-model", 0.25, 99)
    assert (second["model"], third["model"]) == ("given", "call")
    assert served.server.authorizations[-3] == "Bearer sk-test-0123456789"
    for id in (program, given):
        kept = served.state(id)
        assert kept["lm"]["model"] == "openai/saved-model" and kept["lm"].keys().isdisjoint(elsewhere)
    wrong = served.create(state={**state, "lm": {"temperature": 1}})
    assert wrong["error_type"] == "invalid_args" and "lm.model" in wrong["error"]


def test_a_state_path_leads_to_a_state_in_the_folder(served: Served) -> None:
    """`test_media` has the other ways out of it."""
    saved(dspy.Predict(QA), served.folder / "good.json")
    (served.folder / "deep.json").write_text("[" * 100_000)
    (served.folder / "list.json").write_text("[]")
    (served.folder / "state.pkl").write_bytes(pickle.dumps({}))
    (served.folder / "out.json").symlink_to("/etc/passwd")
    served.created(state_path=str(served.folder / "good.json"))
    for path, error_type, said in (
        ("out.json", "not_allowed", "leads out of the folder of DSPY_BRIDGE_STATE_DIR"),
        ("gone.json", "invalid_args", "cannot be read"),
        ("deep.json", "invalid_args", "expected JSON"),
        ("state.pkl", "invalid_args", "expected JSON"),
        ("list.json", "invalid_args", "expected an object"),
        (5, "invalid_args", "expected the name of a file"),
    ):
        reply = served.create(state_path=path)
        assert reply["error_type"] == error_type, reply
        assert reply["error"].startswith("state_path: ") and said in reply["error"]
