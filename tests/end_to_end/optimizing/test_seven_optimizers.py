"""`execute_program` with `optimize`: each optimizer gives what the same code gives in plain Python."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from conftest import lm_env
from lm_server import LMServer
from optimizing_lm import answer
from peer import Peer
from plain_optimizers import EXAMPLES, METRICS, PLAIN, TRAINSET, feedback, on_the_wire, optimize, program
from tool_host import Tools, execute

MODEL = "openai/stub-model"


def reply(request: dict[str, Any]) -> str:
    return answer(request["messages"], request.get("temperature"))


def exact(example: Any, prediction: Any, purpose: str, predictor: Any = None) -> dict[str, Any]:
    """The metric of `plain_optimizers`."""
    score = float(example["answer"] == prediction["answer"])
    return {"score": score, "feedback": feedback(example["answer"])} if purpose == "feedback" else {"score": score}


TOOLS: Tools = {"exact": exact}
METRIC = {"tool": "exact"}


@pytest.fixture(scope="module")
def lm() -> Iterator[LMServer]:
    server = LMServer(reply)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def module_peer(lm: LMServer) -> Iterator[Peer]:
    with Peer(env=lm_env(lm)) as peer:
        yield peer


@pytest.fixture
def peer(module_peer: Peer, lm: LMServer) -> Iterator[Peer]:
    lm.serve(reply)
    assert module_peer.call("create_program", {"id": "qa", "signature": "question -> answer"})["success"]
    yield module_peer
    assert module_peer.call("cleanup")["success"]


def wire_lms(lm: LMServer) -> Any:
    return lambda role: {"model": f"openai/{role}", **lm.options()}


def run(peer: Peer, given: dict[str, Any], program_id: str = "qa", **args: Any) -> dict[str, Any]:
    args = {"program_id": program_id, **on_the_wire(TRAINSET), "metric": METRIC, **args}
    return execute(peer, {**args, "optimize": given}, TOOLS)[0]


def optimized(peer: Peer, given: dict[str, Any], **args: Any) -> dict[str, Any]:
    done = run(peer, given, **args)
    assert done["success"], done
    result: dict[str, Any] = done["result"]
    return result


def score(peer: Peer, program_id: str) -> float:
    args = {"program_id": program_id, **on_the_wire(EXAMPLES), "metric": METRIC}
    done, _ = execute(peer, args, TOOLS)
    assert done["success"] and done["result"]["failed"] == 0, done
    found: float = done["result"]["score"]
    return found


def without_metadata(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "metadata"}


def requests(lm: LMServer) -> list[str]:
    return sorted(json.dumps(request, sort_keys=True) for request in lm.requests)


def plain(optimizer: str, lm: LMServer) -> tuple[dict[str, Any], float, list[str]]:
    """The state, its score on all examples, and what LMs were asked for the state."""

    def of_role(role: str) -> Any:
        return dspy.LM(f"openai/{role}", **lm.options())

    lm.serve(reply)
    logging.getLogger("dspy").setLevel(logging.CRITICAL)
    with dspy.context(lm=dspy.LM(MODEL, **lm.options()), adapter=dspy.ChatAdapter()):
        module = PLAIN[optimizer](of_role, 2)
        asked = requests(lm)
        found = dspy.Evaluate(devset=EXAMPLES, metric=METRICS.score, num_threads=2)(module).score
    return module.dump_state(), found, asked


@pytest.mark.filterwarnings("ignore:Argument ``multivariate`` is an experimental feature")
@pytest.mark.parametrize("optimizer", PLAIN)
def test_its_state_loads_and_scores_as_that_of_the_same_code_in_python(
    peer: Peer, lm: LMServer, optimizer: str
) -> None:
    result = optimized(peer, optimize(optimizer, wire_lms(lm)))
    asked = requests(lm)
    assert peer.call("create_program", {"id": "better", "signature": "question -> answer", "state": result["state"]})[
        "success"
    ]
    found = score(peer, "better")
    state, wanted, plainly_asked = plain(optimizer, lm)
    assert without_metadata(result["state"]) == json.loads(json.dumps(state))
    assert round(100 * found, 2) == wanted
    assert asked == plainly_asked
    assert state != program().dump_state() and result["lm_calls"] == len(asked)
